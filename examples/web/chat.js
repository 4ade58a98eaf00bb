// A chat with a model that runs in this page. The server gives the model's address and WebLLM.
import { CreateMLCEngine } from "./web-llm/index.js";

const element = (id) => document.getElementById(id);
const ui = {
  model: element("model"),
  loading: element("loading"),
  progress: element("progress"),
  status: element("status"),
  messages: element("messages"),
  form: element("form"),
  input: element("input"),
  temperature: element("temperature"),
  maxTokens: element("max-tokens"),
  speed: element("speed"),
  clear: element("clear"),
  stop: element("stop"),
  send: element("send"),
};

let engine;
let conversation = [];
let answering = false;

function fail(message) {
  ui.progress.hidden = true;
  ui.status.textContent = message;
  ui.status.classList.add("error");
  ui.loading.hidden = false;
}

function show(role, text) {
  const bubble = document.createElement("div");
  bubble.className = `message ${role}`;
  bubble.textContent = text;
  ui.messages.append(bubble);
  bubble.scrollIntoView({ block: "end" });
  return bubble;
}

function setAnswering(now) {
  answering = now;
  ui.input.disabled = ui.send.disabled = now;
  ui.clear.disabled = now || conversation.length === 0;
  ui.stop.disabled = !now;
  if (!now) ui.input.focus();
}

// Why this browser cannot run a model with these features, or null.
async function whatIsMissing(features) {
  if (!window.isSecureContext) {
    return "Browsers offer WebGPU only to https:// pages and to http://localhost.";
  }
  const adapter = navigator.gpu && (await navigator.gpu.requestAdapter());
  if (!adapter) return "This browser has no WebGPU, or no graphics adapter for it.";
  const missing = features.filter((feature) => !adapter.features.has(feature));
  if (missing.includes("shader-f16")) {
    return "This adapter has no 16-bit floats. Build the model with --target webgpu-f32.";
  }
  return missing.length ? `This adapter lacks ${missing.join(", ")}.` : null;
}

async function load() {
  const response = await fetch("models.json");
  if (!response.ok) throw new Error(`models.json: status ${response.status}`);
  const { model_list: list, model_id: id } = await response.json();
  const record = list.find((entry) => entry.model_id === id);
  ui.model.textContent = id;
  const missing = await whatIsMissing(record.required_features);
  if (missing) {
    fail(missing);
    return;
  }
  const absolute = (path) => new URL(path, location.href).href;
  const model = { ...record, model: absolute(record.model), model_lib: absolute(record.model_lib) };
  const chatConfig = await (await fetch(`${model.model}resolve/main/mlc-chat-config.json`)).json();
  ui.temperature.value = chatConfig.temperature;
  engine = await CreateMLCEngine(id, {
    appConfig: { model_list: [model] },
    initProgressCallback: ({ progress, text }) => {
      ui.progress.value = progress;
      ui.status.textContent = text;
    },
    logLevel: "WARN",
  });
  ui.loading.hidden = true;
  setAnswering(false);
}

async function answer(text) {
  conversation.push({ role: "user", content: text });
  show("user", text);
  const bubble = show("assistant", "");
  setAnswering(true);
  const start = performance.now();
  let first = 0;
  let tokens = 0;
  let reply = "";
  try {
    const chunks = await engine.chat.completions.create({
      messages: conversation,
      temperature: Number(ui.temperature.value),
      max_tokens: Number(ui.maxTokens.value),
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of chunks) {
      const delta = chunk.choices[0]?.delta?.content ?? "";
      if (delta) {
        first ||= performance.now();
        tokens += 1;
        reply += delta;
        bubble.textContent = reply;
        bubble.scrollIntoView({ block: "end" });
        ui.speed.textContent = `${rate(tokens - 1, performance.now() - first)} tok/s`;
      }
      if (chunk.usage) {
        const { prompt_tokens, completion_tokens, extra } = chunk.usage;
        ui.speed.textContent =
          `${extra.decode_tokens_per_s.toFixed(1)} tok/s, ${completion_tokens} tokens, ` +
          `${prompt_tokens} before, first after ${((first - start) / 1000).toFixed(2)} s`;
      }
    }
    conversation.push({ role: "assistant", content: reply });
  } catch (error) {
    conversation.pop(); // what was not answered is asked again or forgotten
    bubble.classList.add("error");
    bubble.textContent = `${reply}\n${error?.message ?? error}`.trim();
  } finally {
    setAnswering(false);
  }
}

const rate = (tokens, milliseconds) =>
  milliseconds > 0 ? ((1000 * tokens) / milliseconds).toFixed(1) : "…";

ui.form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = ui.input.value.trim();
  if (!text || answering || !engine) return;
  ui.input.value = "";
  answer(text);
});
ui.input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    ui.form.requestSubmit();
  }
});
ui.stop.addEventListener("click", () => engine?.interruptGenerate());
ui.clear.addEventListener("click", async () => {
  conversation = [];
  ui.messages.replaceChildren();
  ui.speed.textContent = "";
  await engine.resetChat();
  setAnswering(false);
});

load().catch((error) => fail(`The model could not be loaded: ${error?.message ?? error}`));
