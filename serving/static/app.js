// The page: send images to the service and show what it saw. No framework, no build step, nothing from another host.
"use strict";

const $ = (id) => document.getElementById(id);
const shown = new Set(); // results on the page, so that the sliders can draw them again
const LONGEST_SIDE = 1024; // of a drawn picture
const JOBS_EVERY_MS = 2000;

function headers(extra = {}) {
  const token = $("token").value.trim();
  return token ? { ...extra, Authorization: `Bearer ${token}` } : extra;
}

async function failure(response) {
  try {
    const { error } = await response.json();
    return new Error(`${error.kind}: ${error.message}`);
  } catch {
    return new Error(`the service answered ${response.status}`);
  }
}

async function add(files) {
  const images = [...files];
  if (!images.length) return;
  let failed = 0;
  for (const [k, file] of images.entries()) {
    $("status").textContent = `Scoring ${k + 1} of ${images.length}: ${file.name}`;
    if (!(await score(file))) failed += 1;
  }
  $("status").textContent = failed ? `${failed} of ${images.length} could not be scored.` : `${images.length} scored.`;
}

async function score(file) {
  const article = $("result").content.firstElementChild.cloneNode(true);
  article.querySelector("h3").textContent = file.name || "pasted image";
  $("results").prepend(article);
  const begun = performance.now();
  try {
    const response = await fetch("v1/saliency", {
      method: "POST", headers: headers({ "Content-Type": file.type || "application/octet-stream", Accept: "application/json" }), body: file,
    });
    if (!response.ok) throw await failure(response);
    const answer = await response.json();
    await show(article, file, answer, performance.now() - begun);
    return true;
  } catch (error) {
    const line = article.querySelector(".error");
    line.textContent = error.message;
    line.hidden = false;
    article.querySelector(".pictures").hidden = article.querySelector(".facts").hidden = true;
    if (error.message.startsWith("unauthorised")) { $("access").open = true; $("token").focus(); }
    return false;
  }
}

async function show(article, file, answer, milliseconds) {
  article.querySelector("h3").textContent += `: ${answer.class_name}`;
  for (const { class_name, score } of answer.topk) {
    const item = document.createElement("li");
    const name = document.createElement("span"), bar = document.createElement("meter"), share = document.createElement("span");
    name.textContent = class_name;
    bar.value = score;
    bar.setAttribute("aria-hidden", "true");
    share.textContent = `${(100 * score).toFixed(1)} %`;
    item.append(name, bar, share);
    article.querySelector(".classes").append(item);
  }
  const box = answer.box ? answer.box.map((v) => Math.round(v)).join(", ") : "none";
  article.querySelector(".figures").textContent =
    `${answer.width} × ${answer.height} pixels · mask area ${(100 * answer.area).toFixed(1)} % · box ${box} · ${milliseconds.toFixed(0)} ms · engine ${answer.engine.slice(0, 12)}`;
  const mask = await greys(await bitmap(fromBase64(answer.mask)));
  // What the browser cannot show (TIFF, say), the service decodes for it.
  const picture = await bitmap(file).catch(() => decodedByService(file));
  if (!picture) {
    article.querySelector(".pictures").hidden = true;
    const line = article.querySelector(".error");
    line.textContent = "The image was scored, but this browser cannot show it.";
    line.hidden = false;
    return;
  }
  const result = { article, answer, mask, picture };
  shown.add(result);
  draw(result);
}

const fromBase64 = (text) => new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: "image/png" });
const bitmap = (blob) => createImageBitmap(blob, { imageOrientation: "from-image" });

async function decodedByService(file) {
  try {
    const response = await fetch("v1/saliency?opacity=0&box=false", { method: "POST", headers: headers({ Accept: "image/png" }), body: file });
    return response.ok ? await bitmap(await response.blob()) : null;
  } catch {
    return null;
  }
}

// A mask as { width, height, values }, values 0..255.
async function greys(image) {
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  return { width: image.width, height: image.height, values: data.filter((_, k) => k % 4 === 0) };
}

// An approximation of Google's Turbo colour map by polynomials; t in 0..1.
function turbo(t) {
  const r = 34.61 + t * (1172.33 - t * (10793.56 - t * (33300.12 - t * (38394.49 - t * 14825.05))));
  const g = 23.31 + t * (557.33 + t * (1225.33 - t * (3574.96 - t * (1073.77 + t * 707.56))));
  const b = 27.2 + t * (3211.1 - t * (15327.97 - t * (27814 - t * (22569.18 - t * 6838.66))));
  return [r, g, b].map((v) => Math.max(0, Math.min(255, v)));
}
const COLOURS = Array.from({ length: 256 }, (_, k) => turbo(k / 255));

// The mask as a canvas of its own cells: colour(value) gives [r, g, b, a], 0..255.
function painted(mask, colour) {
  const canvas = new OffscreenCanvas(mask.width, mask.height), context = canvas.getContext("2d");
  const pixels = context.createImageData(mask.width, mask.height);
  mask.values.forEach((value, k) => pixels.data.set(colour(value), 4 * k));
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function draw({ article, answer, mask, picture }) {
  const [over, inside, outside] = ["overlay", "inside", "outside"].map((name) => article.querySelector(`canvas.${name}`));
  const evidence = `${answer.class_name}, ${(100 * answer.score).toFixed(1)} per cent; mask covers ${(100 * answer.area).toFixed(0)} per cent`;
  over.setAttribute("aria-label", `Evidence for ${evidence}`);
  inside.setAttribute("aria-label", "The picture where the mask is");
  outside.setAttribute("aria-label", "The picture where the mask is not");
  const scale = Math.min(1, LONGEST_SIDE / Math.max(answer.width, answer.height));
  const width = Math.max(1, Math.round(answer.width * scale)), height = Math.max(1, Math.round(answer.height * scale));
  for (const canvas of [over, inside, outside]) Object.assign(canvas, { width, height });
  const opacity = $("opacity").value / 100, threshold = (255 * $("threshold").value) / 100;
  const level = (value) => (threshold ? (value > threshold ? 255 : 0) : value);
  const [x0, y0, x1, y1] = answer.view.map((v) => v * scale);
  const stretch = (context, layer) => {
    context.imageSmoothingEnabled = $("smooth").checked && !threshold;
    context.drawImage(layer, x0, y0, x1 - x0, y1 - y0);
  };

  let context = over.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  context.globalAlpha = opacity;
  stretch(context, painted(mask, (value) => [...COLOURS[value], level(value)]));
  context.globalAlpha = 1;
  if ($("box").checked && answer.box) {
    const [bx0, by0, bx1, by1] = answer.box.map((v) => v * scale);
    for (const [colour, line] of [["#000", 5], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = (line * Math.max(width, height)) / 640;
      context.strokeRect(bx0, by0, bx1 - bx0, by1 - by0);
    }
  }
  // Masked in keeps the picture where the mask is, masked out where it is not; outside the view there is no mask.
  for (const [canvas, mode] of [[inside, "destination-in"], [outside, "destination-out"]]) {
    context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0, width, height);
    const layer = new OffscreenCanvas(width, height);
    stretch(layer.getContext("2d"), painted(mask, (value) => [0, 0, 0, level(value)]));
    context.globalCompositeOperation = mode;
    context.drawImage(layer, 0, 0);
    context.globalCompositeOperation = "source-over";
  }
}

function redraw() {
  document.querySelector("output[for=opacity]").value = `${$("opacity").value} %`;
  const threshold = Number($("threshold").value);
  document.querySelector("output[for=threshold]").value = threshold ? (threshold / 100).toFixed(2) : "off";
  $("threshold").setAttribute("aria-valuetext", threshold ? (threshold / 100).toFixed(2) : "off");
  shown.forEach(draw);
}

for (const id of ["opacity", "threshold", "box", "smooth"]) $(id).addEventListener("input", redraw);
$("file").addEventListener("change", async (event) => { await add(event.target.files); event.target.value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => add(event.clipboardData.files));

// Jobs

const seconds = (value) => (value == null ? "" : value < 90 ? `${Math.round(value)} s` : value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`);

async function refreshJobs() {
  try {
    const response = await fetch("v1/jobs", { headers: headers() });
    if (response.ok) {
      const jobs = await response.json();
      $("jobs").hidden = false;
      const focused = document.activeElement.closest("#job-rows tr")?.dataset.job; // keyboards must not lose their place
      $("job-rows").replaceChildren(...(jobs.length ? jobs.map(jobRow) : [emptyRow()]));
      if (focused) [...$("job-rows").rows].find((row) => row.dataset.job === focused)?.querySelector("button")?.focus();
    } else $("jobs").hidden = true;
  } catch {
    $("jobs").hidden = true; // the service is away; the next round will tell
  }
  setTimeout(refreshJobs, JOBS_EVERY_MS);
}

function emptyRow() {
  const row = document.createElement("tr"), cell = row.insertCell();
  cell.colSpan = 7;
  cell.textContent = "No jobs yet.";
  return row;
}

function jobRow(job) {
  const row = document.createElement("tr");
  row.dataset.job = job.id;
  const progress = document.createElement("progress");
  if (job.total) { progress.max = job.total; progress.value = job.done; }
  progress.setAttribute("aria-label", `Progress of job ${job.id}`);
  row.insertCell().textContent = job.id;
  row.insertCell().textContent = job.state;
  row.insertCell().append(progress, ` ${job.done} of ${job.total ?? "?"}`);
  row.insertCell().textContent = job.errors;
  row.insertCell().textContent = job.images_per_second ? job.images_per_second.toFixed(1) : "";
  row.insertCell().textContent = job.state === "running" ? seconds(job.seconds_left) : "";
  const action = row.insertCell();
  if (job.state === "queued" || job.state === "running") {
    const button = document.createElement("button");
    button.textContent = "Cancel";
    button.setAttribute("aria-label", `Cancel job ${job.id}`);
    button.addEventListener("click", () => fetch(`v1/jobs/${encodeURIComponent(job.id)}`, { method: "DELETE", headers: headers() }));
    action.append(button);
  }
  return row;
}

redraw();
refreshJobs();
