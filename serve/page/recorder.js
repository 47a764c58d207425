"use strict";

// Records from the microphone, and turns what the browser can play into 16 kHz mono WAV, so that the
// server needs no decoder for the browser's own formats.

const WAV_RATE_HZ = 16000;

/** 16-bit mono WAV of samples in [-1, 1]. */
function encodeWav(samples, rateHz) {
  const bytes = new DataView(new ArrayBuffer(44 + samples.length * 2));
  const text = (at, value) => [...value].forEach((c, i) => bytes.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + samples.length * 2, true);
  text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true);
  bytes.setUint16(20, 1, true);
  bytes.setUint16(22, 1, true);
  bytes.setUint32(24, rateHz, true);
  bytes.setUint32(28, rateHz * 2, true);
  bytes.setUint16(32, 2, true);
  bytes.setUint16(34, 16, true);
  text(36, "data");
  bytes.setUint32(40, samples.length * 2, true);
  samples.forEach((sample, i) => {
    const clipped = Math.max(-1, Math.min(1, sample));
    bytes.setInt16(44 + i * 2, Math.round(clipped * 32767), true);
  });
  return new Blob([bytes], { type: "audio/wav" });
}

/** A WAV file of whatever the browser can decode. */
async function toWav(blob, name) {
  const context = new OfflineAudioContext(1, 1, WAV_RATE_HZ);
  const decoded = await context.decodeAudioData(await blob.arrayBuffer());
  const render = new OfflineAudioContext(1, Math.max(1, decoded.length), WAV_RATE_HZ);
  const source = render.createBufferSource();
  source.buffer = decoded;
  source.connect(render.destination);
  source.start();
  const mono = await render.startRendering();
  const stem = name.replace(/\.[^.]*$/, "");
  return new File([encodeWav(mono.getChannelData(0), WAV_RATE_HZ)], `${stem}.wav`);
}

/** Starts recording; resolves to a function that stops and gives the recording as a WAV file. */
async function startRecording() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  const ended = new Promise((resolve) => { recorder.onstop = resolve; });
  recorder.start();
  return async () => {
    recorder.stop();
    await ended;
    stream.getTracks().forEach((track) => track.stop());
    return toWav(new Blob(parts, { type: recorder.mimeType }), "recording");
  };
}
