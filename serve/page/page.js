"use strict";

const byId = (id) => document.getElementById(id);
const READ_BY_SERVER = /\.(wav|flac|ogg|oga|opus|mp3|aif|aiff|au)$/i;
const names = new Intl.DisplayNames(["en"], { type: "language" });

let audio = null;
let models = [];
let stopRecording = null;
let running = null;

function say(text, isFault = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("fault", isFault);
}

function authorisation() {
  const key = byId("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function faultOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function fill(select, entries, kept) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === kept)) select.value = kept;
}

function showLanguages() {
  const model = models.find((m) => m.id === byId("model-a").value);
  const codes = model?.languages ?? [];
  const language = byId("language");
  const kept = language.value || model?.default_language || "de";
  fill(language, codes.length ? codes.map((c) => [c, names.of(c)]) : [["", "its own"]], kept);
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: authorisation() });
  if (response.status === 401) byId("access").open = true;
  if (!response.ok) throw new Error(await faultOf(response));
  models = (await response.json()).data;
  const entries = models.map((m) => [m.id, m.id]);
  fill(byId("model-a"), entries, byId("model-a").value);
  fill(byId("model-b"), [["", "nothing"], ...entries], byId("model-b").value);
  showLanguages();
}

function use(file) {
  audio = file;
  byId("chosen").textContent = `${file.name} (${Math.max(1, Math.round(file.size / 1024))} KB)`;
  const player = byId("player");
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = false;
  byId("translate").disabled = false;
  say("");
}

async function choose(file) {
  if (!file) return;
  if (READ_BY_SERVER.test(file.name)) return use(file);
  try {
    use(await toWav(file, file.name));
  } catch {
    // The server may read what the browser cannot.
    use(file);
  }
}

async function toggleRecording() {
  const button = byId("record");
  try {
    if (stopRecording) {
      const stop = stopRecording;
      stopRecording = null;
      use(await stop());
    } else {
      stopRecording = await startRecording();
      say("Recording…");
    }
  } catch {
    say("No recording: the browser gave no microphone.", true);
  }
  button.setAttribute("aria-pressed", String(Boolean(stopRecording)));
  button.textContent = stopRecording ? "Stop recording" : "Record";
}

/** The data of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
  }
}

function card(model, language) {
  const node = byId("result").content.firstElementChild.cloneNode(true);
  node.querySelector("h2").textContent = model;
  if (language) node.querySelector(".text").lang = language;
  byId("results").append(node);
  return node;
}

function fact(node, name, value) {
  const row = document.createElement("div");
  const term = document.createElement("dt");
  const detail = document.createElement("dd");
  term.textContent = name;
  detail.textContent = value;
  row.append(term, detail);
  node.querySelector(".facts").append(row);
}

async function translateWith(model, signal) {
  const language = byId("language").value;
  const node = card(model, language);
  const text = node.querySelector(".text");
  const body = new FormData();
  body.append("file", audio, audio.name);
  body.append("model", model);
  body.append("stream", "true");
  if (language) body.append("to_language", language);
  const start = performance.now();
  let first = 0;
  const response = await fetch("/v1/audio/translations", {
    method: "POST", body, signal, headers: authorisation(),
  });
  if (!response.ok) throw new Error(await faultOf(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "transcript.text.delta") {
      first = first || performance.now();
      text.textContent += event.delta;
    }
    if (event.type === "transcript.text.done") report(node, event, start, first);
  }
}

function report(node, event, start, first) {
  const total = performance.now() - start;
  node.querySelector(".text").textContent = event.text || "(no speech heard)";
  fact(node, "audio", `${event.duration.toFixed(1)} s`);
  fact(node, "first text", first ? `${Math.round(first - start)} ms` : "none");
  fact(node, "total", `${Math.round(total)} ms`);
  fact(node, "RTF", (total / 1000 / event.duration).toFixed(3));
  fact(node, "covered", `${Math.round(event.coverage * 100)} %`);
  if (event.truncated) fact(node, "note", "cut at the token limit");
}

async function translate(submit) {
  submit.preventDefault();
  if (!audio || running) return;
  running = new AbortController();
  byId("translate").disabled = true;
  byId("stop").hidden = false;
  byId("results").replaceChildren();
  try {
    const chosen = [byId("model-a").value, byId("model-b").value].filter(Boolean);
    // One after another: side by side they would slow each other down.
    for (const model of chosen) {
      say(`Translating with ${model}…`);
      await translateWith(model, running.signal);
    }
    say("Done.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  }
  running = null;
  byId("translate").disabled = false;
  byId("stop").hidden = true;
}

function start() {
  const drop = byId("drop");
  const refresh = () => loadModels().catch((error) => say(error.message, true));
  byId("form").addEventListener("submit", translate);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("record").addEventListener("click", toggleRecording);
  byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
  byId("model-a").addEventListener("change", showLanguages);
  byId("key").addEventListener("change", refresh);
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    choose(event.dataTransfer.files[0]);
  });
  refresh();
}

start();
