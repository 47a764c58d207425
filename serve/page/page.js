"use strict";

const byId = (id) => document.getElementById(id);
const READ_BY_SERVER = /\.(wav|flac|ogg|oga|opus|mp3|aif|aiff|au)$/i;
const names = new Intl.DisplayNames(["en"], { type: "language" });

let audio = null;
let models = [];
let stopRecording = null;
let running = null;
let choices = 0;

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

async function fetchModels(signal) {
  const response = await fetch("/v1/models", { headers: authorisation(), signal });
  if (response.status === 401) byId("access").open = true;
  if (!response.ok) throw new Error(await faultOf(response));
  return (await response.json()).data;
}

async function loadModels() {
  models = await fetchModels();
  const entries = models.map((m) => [m.id, m.id]);
  fill(byId("model-a"), entries, byId("model-a").value);
  fill(byId("model-b"), [["", "nothing"], ...entries], byId("model-b").value);
  showLanguages();
}

/** Some models know their languages only once they are loaded, as a request does, even one that fails. */
async function updateModels(signal) {
  models = await fetchModels(signal);
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
  const choice = ++choices;
  let found = file;
  if (!READ_BY_SERVER.test(file.name)) {
    // The server may read what the browser cannot.
    found = await toWav(file, file.name).catch(() => file);
  }
  if (choice === choices) use(found); // nothing was chosen while it was converted
}

async function toggleRecording() {
  const button = byId("record");
  const hadFocus = document.activeElement === button;
  // A second click before the microphone is there would ask for another, which nothing would close.
  button.disabled = true;
  const stop = stopRecording;
  try {
    if (stop) {
      stopRecording = null;
      choices += 1;
      use(await stop());
      byId("file").value = ""; // so that the same file can be chosen again
    } else {
      stopRecording = await startRecording();
      say("Recording…");
    }
  } catch {
    say(stop ? "No recording: it holds no sound." : "No recording: the browser gave no microphone.", true);
  }
  button.disabled = false;
  if (hadFocus && document.activeElement === document.body) button.focus();
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
  const text = node.querySelector(".text");
  if (language) text.lang = language;
  node.querySelector(".copy").addEventListener("click", () => copy(text.textContent));
  byId("results").append(node);
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser lets no page copy here.", true);
  }
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

async function translateWith(model, language, clip, signal) {
  const node = card(model, language);
  node.classList.add("runs");
  try {
    return await receive(node, model, language, clip, signal);
  } finally {
    node.classList.remove("runs");
  }
}

/** Sends the audio and shows what comes; the milliseconds that it took. */
async function receive(node, model, language, clip, signal) {
  const text = node.querySelector(".text");
  const body = new FormData();
  body.append("file", clip, clip.name);
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
    if (event.type === "transcript.text.done") return report(node, event, start, first);
  }
  throw new Error("The answer broke off.");
}

function report(node, event, start, first) {
  const total = performance.now() - start;
  node.querySelector(".text").textContent = event.text || "(no speech heard)";
  fact(node, "audio", `${event.duration.toFixed(1)} s`);
  fact(node, "first text", first ? `${Math.round(first - start)} ms` : "none");
  fact(node, "total", `${Math.round(total)} ms`);
  fact(node, "RTF", (total / 1000 / event.duration).toFixed(3));
  fact(node, "covered", `${Math.round(event.coverage * 100)} %`);
  if (event.truncated) fact(node, "note", "cut short");
  node.querySelector(".copy").hidden = !event.text;
  showStretches(node, event.segments);
  return total;
}

/** The parts of long audio with their times. */
function showStretches(node, segments) {
  if (segments.length < 2) return;
  const details = node.querySelector(".stretches");
  details.hidden = false;
  details.querySelector("summary").textContent = `${segments.length} stretches with times`;
  details.querySelector("ol").replaceChildren(...segments.map((segment) => {
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.textContent = clock(segment.start);
    item.append(time, segment.text || "(silence)");
    return item;
  }));
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Bars as long as each model took, and who was faster; of a request that loaded its model, time tells no speed. */
function compare(chosen, totals, cold, evicted) {
  const longest = Math.max(...totals);
  document.querySelectorAll(".bar span").forEach((bar, place) => {
    bar.style.width = `${Math.max(1, (100 * totals[place]) / longest)}%`;
  });
  if (totals.length < 2) return;
  const line = byId("comparison");
  line.hidden = false;
  if (cold.length && evicted.length) {
    line.textContent = "No comparison: the two models do not fit into the server's memory together.";
    return;
  }
  if (cold.length) {
    line.textContent = `${cold.join(" and ")} had to be loaded first. Translate again to compare.`;
    return;
  }
  const fast = totals[0] <= totals[1] ? 0 : 1;
  const times = totals[1 - fast] / totals[fast];
  line.textContent = `${chosen[fast]} was ${times.toFixed(1)} times as fast as ${chosen[1 - fast]}.`;
}

async function translate(submit) {
  submit.preventDefault();
  if (!audio || running) return;
  running = new AbortController();
  const hadFocus = document.activeElement === byId("translate");
  byId("translate").disabled = true;
  byId("stop").hidden = false;
  if (hadFocus) byId("stop").focus();
  byId("results").replaceChildren();
  byId("comparison").hidden = true;
  try {
    if (!models.length) await loadModels();
    const chosen = [byId("model-a").value, byId("model-b").value].filter(Boolean);
    if (!chosen.length) throw new Error("The server has no model.");
    // The same for both models, whatever is chosen meanwhile.
    const [clip, language] = [audio, byId("language").value];
    // One after another: side by side they would slow each other down.
    const totals = [];
    const cold = [];
    for (const model of chosen) {
      say(`Translating with ${model}…`);
      await updateModels(running.signal);
      const known = models.find((m) => m.id === model);
      if (known?.loaded === false) cold.push(model);
      totals.push(await translateWith(model, language, clip, running.signal));
    }
    await updateModels(running.signal);
    const evicted = chosen.filter((id) => models.find((m) => m.id === id)?.loaded === false);
    compare(chosen, totals, cold, evicted);
    say("Done.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  }
  running = null;
  byId("translate").disabled = false;
  if (document.activeElement === byId("stop")) byId("translate").focus();
  byId("stop").hidden = true;
  updateModels().catch(() => {}); // what went wrong has been said
}

function start() {
  const refresh = () => loadModels().then(() => say(""), (error) => say(error.message, true));
  byId("form").addEventListener("submit", translate);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("record").addEventListener("click", toggleRecording);
  byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
  byId("model-a").addEventListener("change", showLanguages);
  byId("key").addEventListener("change", refresh);
  const over = (is) => document.body.classList.toggle("over", is);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => over(event.relatedTarget !== null));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    byId("file").value = "";
    choose(event.dataTransfer.files[0]);
  });
  refresh();
}

start();
