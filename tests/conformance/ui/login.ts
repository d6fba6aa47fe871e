// SPDX-License-Identifier: BSD-3-Clause
// Logs in as a person does, by the link with the token; the tests' browsers begin with the cookies.

import { request } from '@playwright/test';

export default async function login() {
  const context = await request.newContext();
  const response = await context.get(`${process.env.UI_URL}/lab?token=${process.env.UI_TOKEN}`);
  if (!response.ok()) throw new Error(`the server responds with ${response.status()} to its link`);
  await context.storageState({ path: process.env.UI_STATE });
  await context.dispose();
}
