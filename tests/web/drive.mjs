// Runs steps in headless Chromium: node drive.mjs STEPS.json, with WebGPU in software (SwiftShader).
//
// STEPS: {tools, chromium, profile, url, steps: [[kind, argument]]}; kinds are
//   evaluate    JavaScript text of a function; its result is an entry of the output
//   fill, click, wait   a CSS selector (fill: [selector, text])
//   screenshot  a path of a PNG file
// Output: one line of JSON {results, console}; what the page logs goes to stderr as it comes.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(join(job.tools, "package.json"))("playwright-core");

const context = await chromium.launchPersistentContext(job.profile, {
  executablePath: job.chromium,
  headless: true,
  ignoreDefaultArgs: ["--disable-gpu"],
  viewport: { width: 900, height: 700 },
  args: [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
  ],
});
try {
  const page = await context.newPage();
  page.setDefaultTimeout(0); // the caller ends this process
  const log = [];
  const note = (line) => {
    log.push(line);
    console.error(line);
  };
  page.on("console", (message) => note(message.text()));
  page.on("pageerror", (error) => note(`error: ${error}`));
  await page.goto(job.url);
  const results = [];
  for (const [kind, argument] of job.steps) {
    if (kind === "evaluate") results.push(await page.evaluate(`(${argument})()`));
    else if (kind === "fill") await page.fill(...argument);
    else if (kind === "click") await page.click(argument);
    else if (kind === "wait") await page.waitForSelector(argument);
    else if (kind === "screenshot") await page.screenshot({ path: argument });
    else throw new Error(`unknown step ${kind}`);
  }
  console.log(JSON.stringify({ results, console: log }));
} finally {
  await context.close();
}
