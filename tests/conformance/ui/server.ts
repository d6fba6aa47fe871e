// SPDX-License-Identifier: BSD-3-Clause
// Takes the place of @jupyterlab/galata in the tests: the same, for a server below a path that requires a token.
// Galata's own requests outside of a page begin with /api, and have no token.

import { test as base } from '@jupyterlab/galata/lib/index.js';

export * from '@jupyterlab/galata/lib/index.js';

const METHODS = ['fetch', 'get', 'put', 'post', 'patch', 'delete', 'head'];

// Galata stands in for these parts of the server, by the address of each request. So the page's request for several
// answers (nbagent/zygote/first_answers.js) goes on without them, and the page sends a request for each.
const REPLACED = /^(lab\/)?api\/(kernels|me|sessions|settings|terminals|workspaces)\b/;

export const test = base.extend({
  context: async ({ context }, use) => {
    await context.route(/\/api\/nbagent\/answers\?/, route => {
      const url = new URL(route.request().url());
      const paths = url.searchParams.getAll('path').filter(path => !REPLACED.test(path));
      url.search = new URLSearchParams(paths.map(path => ['path', path])).toString();
      return route.continue({ url: url.href });
    });
    await use(context);
  },
  request: async ({ playwright, baseURL }, use) => {
    const context = await playwright.request.newContext({
      baseURL,
      extraHTTPHeaders: { Authorization: `token ${process.env.UI_TOKEN}` }
    });
    const below = url => (typeof url === 'string' && url.startsWith('/') ? baseURL + url : url);
    await use(
      new Proxy(context, {
        get: (target, name) => {
          const value = target[name];
          if (typeof value !== 'function') return value;
          if (!METHODS.includes(name as string)) return value.bind(target);
          return (url, options) => value.call(target, below(url), options);
        }
      })
    );
    await context.dispose();
  }
});
