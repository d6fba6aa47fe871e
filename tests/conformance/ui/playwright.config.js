// SPDX-License-Identifier: BSD-3-Clause
// UI_URL is the server's address without a slash at its end, UI_TOKEN its token, UI_STATE a file for cookies,
// UI_RESULTS the file of results.

module.exports = {
  testDir: '.',
  testMatch: ['steps.test.ts', 'jupyterlab/*.test.ts', 'jupyterlab/*.spec.ts'],
  globalSetup: require.resolve('./login'),
  // Pictures depend on fonts and on the version of the browser.
  ignoreSnapshots: true,
  fullyParallel: true,
  workers: Number(process.env.UI_WORKERS ?? 2),
  retries: 1,
  // JupyterLab's own values are 60 s and 5 s, on machines that do nothing else.
  timeout: 90000,
  expect: { timeout: 15000 },
  reporter: [['line'], ['json', { outputFile: process.env.UI_RESULTS }]],
  outputDir: 'output',
  use: {
    baseURL: process.env.UI_URL,
    storageState: process.env.UI_STATE,
    viewport: { width: 1024, height: 768 },
    contextOptions: { permissions: ['clipboard-read', 'clipboard-write'] },
    launchOptions: {
      executablePath: '/usr/bin/chromium',
      args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-proxy-server']
    }
  }
};
