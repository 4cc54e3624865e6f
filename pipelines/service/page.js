// The page of the service: asks /v1/segment once for each chosen system, and draws what comes back.

const COLOURS = [[255, 45, 135], [0, 167, 196], [240, 138, 0], [63, 174, 41], [140, 91, 255], [216, 180, 0]];
const LONGEST = 1024; // pixels of a drawn side: more is not seen
const PATIENCE = 250; // milliseconds after the slider's last move
const byId = (name) => document.getElementById(name);

let picture = null; // { file, bitmap }; bitmap is null where the browser cannot show what the service reads
let running = null; // the AbortController of the questions under way
let pending = 0; // the timer of the slider

class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the service answered ${status}`);
    this.problems = error?.problems ?? [];
  }
}

// ---------------------------------------------------------------- asking

async function call(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, { message: "the service does not answer: is it still running?" });
    }
    if (response.status === 401) {
      if (token === sessionStorage.getItem("token")) await login(token !== null);
      continue;
    }
    const body = await response.json().catch(() => null);
    if (!response.ok) throw new Refused(response.status, body?.error);
    return body;
  }
}

let asking = null; // the promise of a token, while somebody is asked for one

function login(again) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("login");
    byId("login-title").textContent = again ? "That was not the token" : "This service wants a token";
    byId("token").value = "";
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("token", byId("token").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.showModal();
  });
  return asking;
}

async function listModels() {
  try {
    const { models } = await call("/v1/models");
    byId("loading").remove();
    models.forEach((model, i) => {
      const row = document.createElement("div");
      row.className = "choice";
      const box = Object.assign(document.createElement("input"), { type: "checkbox", id: `model-${i}`, value: model.name, checked: true });
      const label = document.createElement("label");
      label.htmlFor = box.id;
      label.textContent = model.name;
      const from = document.createElement("small");
      from.textContent = `${model.uri ?? model.system}, weights ${model.weights_sha256.slice(0, 12)}` +
        (model.uses_threshold ? "" : ", knows no threshold");
      label.append(from);
      row.append(box, label);
      byId("models").append(row);
    });
  } catch (error) {
    byId("loading").textContent = error.message;
  }
}

function question(model, phrases) {
  const form = new FormData();
  form.append("image", picture.file, "picture");
  for (const phrase of phrases) form.append("expression", phrase);
  form.append("model", model);
  form.append("threshold", byId("threshold").value);
  form.append("masks", "png");
  form.append("location", byId("location").checked ? "true" : "false");
  return form;
}

async function ask(event) {
  event?.preventDefault();
  const phrases = byId("phrases").value.split("\n").map((line) => line.trim()).filter((line) => line);
  const models = [...document.querySelectorAll("#models input:checked")].map((box) => box.value);
  const missing = [
    [picture === null, "choose a picture", byId("file")],
    [phrases.length === 0, "write a phrase", byId("phrases")],
    [models.length === 0, "choose a system", document.querySelector("#models input")],
  ].filter(([wrong]) => wrong);
  if (missing.length) {
    complain({ message: `First ${missing.map(([, what]) => what).join(", then ")}.` });
    missing[0][2]?.focus();
    return;
  }
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  complain(null);
  byId("status").textContent = "Looking …";
  byId("find").setAttribute("aria-busy", "true");
  const start = performance.now();
  const answers = await Promise.allSettled(
    models.map((model) => call("/v1/segment", { method: "POST", body: question(model, phrases), signal })),
  );
  if (signal.aborted) return; // another question has taken its place
  byId("find").removeAttribute("aria-busy");
  const failed = answers.filter((each) => each.status === "rejected");
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  const count = phrases.length === 1 ? "1 phrase" : `${phrases.length} phrases`;
  byId("status").textContent = failed.length === answers.length ? "" : `${count}, ${seconds} seconds.`;
  if (failed.length === answers.length) complain(failed[0].reason);
  else await show(phrases, models, answers, signal);
}

function complain(error) {
  const box = byId("error");
  box.hidden = error === null;
  if (error === null) return;
  byId("status").textContent = "";
  box.textContent = capital(error.message);
  if (error.problems?.length) {
    const list = document.createElement("ul");
    for (const problem of error.problems) list.append(Object.assign(document.createElement("li"), { textContent: problem }));
    box.append(list);
  }
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// ---------------------------------------------------------------- showing

async function show(phrases, models, answers, signal) {
  const sections = await Promise.all(phrases.map(async (phrase, index) => {
    const section = document.createElement("section");
    section.className = "phrase";
    const title = document.createElement("h2");
    const mark = document.createElement("i");
    mark.className = `c${index % COLOURS.length}`;
    title.append(mark, phrase);
    const cards = document.createElement("div");
    cards.className = "cards";
    cards.append(...await Promise.all(models.map((model, i) => card(model, phrase, index, answers[i]))));
    section.append(title, cards);
    return section;
  }));
  if (!signal.aborted) byId("results").replaceChildren(...sections);
}

async function card(model, phrase, index, outcome) {
  const figure = byId("card").content.cloneNode(true).firstElementChild;
  figure.querySelector(".system").textContent = model;
  const answer = outcome.value?.answers[index];
  const error = outcome.reason ?? answer.error;
  if (error) {
    const told = Object.assign(document.createElement("p"), { className: "failed", textContent: capital(error.message) });
    figure.querySelector(".pictures").replaceWith(told);
    figure.querySelector(".sure").remove();
    figure.querySelector(".looked").remove();
    return figure;
  }
  const { height, width } = outcome.value.image;
  const share = answer.area / (height * width);
  const notes = [];
  if (answer.cut) notes.push("phrase too long: its end was not heard");
  if (picture.bitmap === null) notes.push("your browser cannot show this format");
  else if (picture.bitmap.width !== width || picture.bitmap.height !== height) notes.push("shown as the service turned it");
  figure.querySelector(".note").textContent = notes.join("; ");
  const meter = figure.querySelector("meter");
  meter.value = answer.score;
  meter.setAttribute("aria-label", "how sure");
  figure.querySelector(".score").textContent = answer.area === 0
    ? "Nothing found"
    : `${Math.round(answer.score * 100)} % sure, covers ${percent(share)} of the picture`;
  const pictures = figure.querySelector(".pictures");
  const canvas = ground(width, height);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", answer.area === 0
    ? `${model} found nothing for “${phrase}”`
    : `The picture with what ${model} marks for “${phrase}”`);
  if (answer.area > 0) mark(canvas, await grey(answer.mask.png, canvas), COLOURS[index % COLOURS.length]);
  pictures.append(canvas);
  if (byId("location").checked) await look(figure.querySelector(".looked"), answer.location, ground(width, height), model, phrase);
  return figure;
}

/** Show where a system looked, brightest where most. */
async function look(place, location, canvas, model, phrase) {
  const words = document.createElement("p");
  place.append(words);
  if (!location) {
    words.textContent = "No map of where it looked: this system has none.";
    return;
  }
  const levels = await grey(location.png, canvas);
  const most = levels.reduce((found, level) => Math.max(found, level), 0);
  words.textContent = `Where it looked: from 0 to ${(most / 255).toFixed(2)}`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Where ${model} looked for “${phrase}”`);
  heat(canvas, levels, Math.max(1, most));
  place.append(canvas);
}

const percent = (share) => (share < 0.001 ? "less than 0.1 %" : `${(share * 100).toFixed(1)} %`);

/** A canvas with the picture, in the proportions of the service's size, which is the picture upright. */
function ground(width, height) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (picture.bitmap === null) {
    context.fillStyle = "#777";
    context.fillRect(0, 0, canvas.width, canvas.height);
  } else {
    context.drawImage(picture.bitmap, 0, 0, canvas.width, canvas.height);
  }
  return canvas;
}

/** The levels 0..255 of a grey PNG in base64, at a canvas' size. */
async function grey(png, canvas) {
  const bytes = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const layer = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = layer.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i]);
}

/** Tint the inside of a mask, darken the rest, and draw the border between them. */
function mark(canvas, mask, colour) {
  const { width, height } = canvas;
  const context = canvas.getContext("2d");
  const image = context.getImageData(0, 0, width, height);
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x] > 127;
  const reach = Math.max(1, Math.round(Math.max(width, height) / 400));
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = 4 * (y * width + x);
      const within = inside(x, y);
      const border = within && !(inside(x - reach, y) && inside(x + reach, y) && inside(x, y - reach) && inside(x, y + reach));
      const share = border ? 1 : 0.45;
      for (let c = 0; c < 3; c++) {
        const value = image.data[i + c];
        image.data[i + c] = within ? value * (1 - share) + colour[c] * share : value * 0.55;
      }
    }
  }
  context.putImageData(image, 0, 0);
}

/** Lay a map over the picture: dark where 0, then violet, orange and pale yellow towards the most there is. */
function heat(canvas, map, most) {
  const stops = [[10, 10, 40], [120, 28, 109], [237, 105, 37], [252, 255, 164]];
  const context = canvas.getContext("2d");
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  map.forEach((level, i) => {
    const place = (level / most) * (stops.length - 1);
    const below = Math.min(stops.length - 2, Math.floor(place));
    for (let c = 0; c < 3; c++) {
      const colour = stops[below][c] + (stops[below + 1][c] - stops[below][c]) * (place - below);
      image.data[4 * i + c] = 0.35 * image.data[4 * i + c] + 0.65 * colour;
    }
  });
  context.putImageData(image, 0, 0);
}

// ---------------------------------------------------------------- choosing

async function choose(file) {
  if (!file) return;
  running?.abort();
  complain(null);
  const bitmap = await createImageBitmap(file).catch(() => null); // upright, as the service reads it
  picture = { file, bitmap };
  const preview = byId("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.hidden = bitmap === null;
  byId("invitation").hidden = bitmap !== null;
  if (bitmap === null) {
    preview.removeAttribute("src");
    byId("invitation").textContent = "Your browser cannot show this file; the service may read it all the same.";
  } else {
    preview.src = URL.createObjectURL(file);
    preview.alt = "The picture that was chosen";
  }
  const size = bitmap === null ? "" : `, ${bitmap.width} × ${bitmap.height}`;
  byId("chosen").textContent = `${file.name || "pasted picture"}${size}. Choose another by clicking on it.`;
  byId("results").replaceChildren(Object.assign(document.createElement("p"), { className: "empty", textContent: "Answers appear here." }));
  if (byId("phrases").value.trim()) await ask();
}

function again() {
  byId("level").textContent = Number(byId("threshold").value).toFixed(2);
  if (document.querySelector(".phrase") === null) return; // nothing was asked yet
  clearTimeout(pending);
  pending = setTimeout(ask, PATIENCE);
}

const drop = byId("drop");
const pictureOf = (transfer) => [...(transfer?.files ?? [])][0];
byId("ask").addEventListener("submit", ask);
byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
byId("threshold").addEventListener("input", again);
byId("location").addEventListener("change", again);
byId("phrases").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
});
document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  choose(pictureOf(event.dataTransfer));
});
document.addEventListener("paste", (event) => { if (pictureOf(event.clipboardData)) choose(pictureOf(event.clipboardData)); });
byId("login-form").addEventListener("submit", () => byId("login").close());
listModels();
