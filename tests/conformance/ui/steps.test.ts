// SPDX-License-Identifier: BSD-3-Clause
// Steps of a person that JupyterLab's own tests do by its API, or with settings that a browser keeps.

import { readFileSync } from 'fs';
import { expect, test } from '@jupyterlab/galata';

const listed = (page, name) => page.locator('.jp-DirListing-item', { hasText: name });
// A slot has no trash.
const DELETE = /^(Delete|Move to Trash)$/;

async function choose(page, name, entry) {
  await listed(page, name).click({ button: 'right' });
  await page.getByRole('menu').getByText(entry, { exact: true }).click();
}

test('a file is created, renamed, copied and deleted', async ({ page, tmpPath }) => {
  await page.menu.clickMenuItem('File>New>Text File');
  await choose(page, 'untitled.txt', 'Rename');
  await page.locator('.jp-DirListing-editor').fill('one.txt');
  await page.keyboard.press('Enter');
  await expect(listed(page, 'one.txt')).toBeVisible();
  await expect(listed(page, 'untitled.txt')).toHaveCount(0);
  await choose(page, 'one.txt', 'Duplicate');
  await expect(listed(page, 'one-Copy1.txt')).toBeVisible();
  await choose(page, 'one.txt', DELETE);
  await page.locator('.jp-Dialog .jp-mod-accept').click();
  await expect(listed(page, /^one\.txt/)).toHaveCount(0);
  expect(await page.contents.fileExists(`${tmpPath}/one.txt`)).toBe(false);
  expect(await page.contents.fileExists(`${tmpPath}/one-Copy1.txt`)).toBe(true);
});

test('a directory is created, filled by cut and paste, and deleted with its file', async ({ page, tmpPath }) => {
  await page.contents.uploadContent('text', 'text', `${tmpPath}/moved.txt`);
  await page.locator('.jp-ToolbarButtonComponent[data-command="filebrowser:create-new-directory"]').click();
  await page.locator('.jp-DirListing-editor').fill('place');
  await page.keyboard.press('Enter');
  await choose(page, 'moved.txt', 'Cut');
  await page.filebrowser.openDirectory(`${tmpPath}/place`);
  await page.locator('.jp-DirListing-content').click({ button: 'right', position: { x: 50, y: 200 } });
  await page.getByRole('menu').getByText('Paste', { exact: true }).click();
  await expect(listed(page, 'moved.txt')).toBeVisible();
  await page.filebrowser.openDirectory(tmpPath);
  await expect(listed(page, 'moved.txt')).toHaveCount(0);
  await choose(page, 'place', DELETE);
  await page.locator('.jp-Dialog .jp-mod-accept').click();
  await expect(listed(page, 'place')).toHaveCount(0);
  expect(await page.contents.directoryExists(`${tmpPath}/place`)).toBe(false);
});

test('a file is uploaded and downloaded', async ({ page, tmpPath }) => {
  const content = Buffer.alloc(3 << 20, 'line of a file\n');
  const chooser = page.waitForEvent('filechooser');
  await page.locator('[data-jp-item-name="uploader"] button, [data-jp-item-name="uploader"] jp-button').first().click();
  await (await chooser).setFiles({ name: 'up.bin', mimeType: 'application/octet-stream', buffer: content });
  await expect(listed(page, 'up.bin')).toBeVisible();
  // JupyterLab lists the file when its first part is written.
  await expect(page.locator('.jp-Statusbar-ProgressBar-progress-bar, .jp-FileUploadStatus')).toHaveCount(0);
  const download = page.waitForEvent('download');
  await choose(page, 'up.bin', 'Download');
  expect(readFileSync(await (await download).path()).equals(content)).toBe(true);
});

test('a notebook is copied into a directory', async ({ page, tmpPath }) => {
  await page.contents.createDirectory(`${tmpPath}/place`);
  await page.contents.uploadContent('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', 'text',
    `${tmpPath}/copied.ipynb`);
  await choose(page, 'copied.ipynb', 'Copy');
  await page.filebrowser.openDirectory(`${tmpPath}/place`);
  await page.locator('.jp-DirListing-content').click({ button: 'right', position: { x: 50, y: 200 } });
  await page.getByRole('menu').getByText('Paste', { exact: true }).click();
  await expect(listed(page, 'copied.ipynb')).toBeVisible();
  expect(await page.contents.fileExists(`${tmpPath}/copied.ipynb`)).toBe(true);
});

test('all cells run, the table of contents has their headings, and text is found and replaced', async ({ page }) => {
  await page.notebook.createNew();
  await page.notebook.setCell(0, 'markdown', '# First\n\n## Second');
  await page.notebook.addCell('code', 'found = "need" + "le"');
  await page.notebook.addCell('code', 'print(found)');
  await page.menu.clickMenuItem('Run>Run All Cells');
  await expect(page.locator('.jp-OutputArea-output')).toHaveText('needle');
  await page.sidebar.openTab('table-of-contents');
  await page.getByRole('treeitem', { name: 'Second', exact: true }).click();
  await page.notebook.selectCells(1);
  await page.keyboard.press('Control+f');
  await page.fill('[placeholder="Find"]', 'found');
  await page.locator('text=/\/2$/').waitFor();
  await page.click('button[title="Show Replace"]');
  await page.fill('[placeholder="Replace"]', 'other');
  await page.click('button:has-text("Replace All")');
  await expect.poll(() => page.notebook.getCellTextInput(2)).toBe('print(other)');
});

test('the debugger stops at a breakpoint and shows a variable', async ({ page }) => {
  await page.notebook.createNew();
  await page.notebook.setCell(0, 'code', 'stopped = 40 + 1\nstopped += 1\nprint(stopped)');
  await page.debugger.switchOn();
  await page.notebook.waitForCellGutter(0);
  await page.notebook.clickCellGutter(0, 2);
  await page.debugger.waitForBreakPoints();
  await page.notebook.runCell(0, { inplace: true, wait: false });
  await page.debugger.waitForCallStack();
  await page.debugger.waitForVariables();
  await expect(await page.debugger.getVariablesPanelLocator()).toContainText('stopped');
  await page.click('jp-button[title^=Continue]');
  await expect(page.locator('.jp-OutputArea-output')).toHaveText('42');
  await page.debugger.switchOff();
});

test.describe('a kernel', () => {
  // Galata's own handler of these requests expects JSON in the response to an interrupt, which has none.
  test.use({ kernels: null });

  test('a cell runs, is interrupted, and a restart forgets its names', async ({ page }) => {
    await page.notebook.createNew();
    const output = page.locator('.jp-Cell-outputArea').first();
    await page.notebook.setCell(0, 'code', 'kept = 6 * 7; kept');
    await page.notebook.runCell(0, true);
    await expect(output).toHaveText(/42/);
    await page.notebook.setCell(0, 'code', 'import time\nprint("begun", flush=True)\ntime.sleep(900)');
    await page.notebook.runCell(0, { inplace: true, wait: false });
    await expect(output).toHaveText(/begun/);
    await page.menu.clickMenuItem('Kernel>Interrupt Kernel');
    await expect(output).toHaveText(/KeyboardInterrupt/);
    await page.notebook.setCell(0, 'code', 'print(kept)');
    await page.notebook.runCell(0, true);
    await expect(output).toHaveText('42');
    await page.menu.clickMenuItem('Kernel>Restart Kernel…');
    await page.locator('.jp-Dialog .jp-mod-accept').click();
    await expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).toBeVisible();
    await page.notebook.runCell(0, true);
    await expect(output).toHaveText(/NameError/);
  });
});

test('an ended kernel is started again by the page', async ({ page }) => {
  await page.notebook.createNew();
  await page.notebook.setCell(0, 'code', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)');
  await page.notebook.runCell(0, { inplace: true, wait: false });
  await page.locator('.jp-Dialog', { hasText: 'The kernel for' }).locator('.jp-mod-accept').click();
  await page.notebook.setCell(0, 'code', '7 * 8');
  await expect(async () => {
    await page.notebook.runCell(0, { inplace: true, wait: false });
    await expect(page.locator('.jp-Cell-outputArea').first()).toHaveText(/56/, { timeout: 5000 });
  }).toPass();
});

test('a terminal runs a program', async ({ page }) => {
  await page.menu.clickMenuItem('File>New>Terminal');
  await page.locator('.jp-Terminal .xterm-screen').click();
  await expect(page.locator('.jp-Terminal [aria-label="Terminal input"]')).toBeFocused();
  // The terminal draws its text, so the result goes to a file.
  await page.keyboard.type('expr 1000 + 234 > ~/terminal.txt');
  await page.keyboard.press('Enter');
  await expect(async () => {
    const file = await page.contents.getContentMetadata('terminal.txt', 'file');
    expect(file.size).toBe('1234\n'.length);
  }).toPass();
  await page.contents.deleteFile('terminal.txt');
});

test.describe('what the server keeps', () => {
  test.use({ mockSettings: false, mockState: false, mockConfig: false });

  test('settings and the workspace are there after a reload', async ({ page, tmpPath }) => {
    const stored = page.waitForResponse(
      response => response.url().includes('api/settings') && response.request().method() === 'PUT' && response.ok()
    );
    await page.theme.setDarkTheme();
    await stored;
    const saved = page.waitForResponse(
      response => response.url().includes('api/workspaces') && response.request().method() === 'PUT'
        && response.request().postData().includes('kept.txt')
    );
    await page.contents.uploadContent('text', 'text', `${tmpPath}/kept.txt`);
    await page.filebrowser.open(`${tmpPath}/kept.txt`);
    expect((await saved).ok()).toBe(true);
    await page.reload({ waitForIsReady: false });
    await expect(page.locator('body')).toHaveAttribute('data-jp-theme-name', 'JupyterLab Dark');
    await expect(page.getByRole('main').getByRole('tab', { name: 'kept.txt' })).toBeVisible();
    await page.theme.setLightTheme();
  });
});
