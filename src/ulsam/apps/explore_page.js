"use strict";

const find = (selector, within = document) => within.querySelector(selector);
const body = document.body, input = find("#file"), radios = find("#show");
let settings; // what the server sent at first
let file = null; // the image that is shown
let next = null; // the image to look at as soon as the one before it is done
let working = false;

// ---------------------------------------------------------------- questions to the server

async function ask(path, image) {
  let answer;
  try {
    answer = await fetch(`${path}?name=${encodeURIComponent(image.name)}`, { method: "POST", body: image });
  } catch {
    throw new Error("The program does not answer, or the file cannot be read. Is ulsam explore still running?");
  }
  if (answer.ok) return answer;
  const detail = answer.headers.get("content-type") === "application/json" ? (await answer.json()).detail : null;
  throw new Error(typeof detail === "string" ? detail : `The program failed (${answer.status}): its terminal says why.`);
}

/** Show what the models find; of images that come while one is looked at, the last is next and the others are left out. */
async function look(image) {
  fail("");
  if (image.size > settings.max_bytes) {
    const size = (image.size / 1e6).toFixed(1), most = settings.max_bytes / 1e6;
    return fail(`${image.name} is too large: it has ${size} MB, and the limit is ${most} MB (--max-mb).`);
  }
  next = image;
  if (working) return;
  working = true;
  while (next) {
    const mine = next;
    next = null;
    busy(true, mine.name);
    try {
      const answer = await (await ask("explain", mine)).json();
      if (next) continue;
      file = mine;
      show(answer);
    } catch (error) {
      if (!next) fail(error.message);
    }
  }
  working = false;
  busy(false);
}

async function download(number, button) {
  button.setAttribute("aria-busy", "true");
  try {
    const address = URL.createObjectURL(await (await ask(`panel/${number}`, file)).blob());
    const link = Object.assign(document.createElement("a"), { href: address });
    link.download = `${file.name.replace(/\.\w+$/, "")}-panel-${models[number].letter}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  } catch (error) {
    fail(error.message);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

// ---------------------------------------------------------------- one card a model

const models = [];

class Model {
  constructor({ name, file }, number, alone) {
    this.letter = number < 26 ? String.fromCharCode(65 + number) : String(number + 1);
    this.name = name;
    this.card = find("#model").content.firstElementChild.cloneNode(true);
    find(".letter", this.card).textContent = this.letter;
    find(".letter", this.card).hidden = alone;
    find("h3", this.card).textContent = name;
    find(".file", this.card).textContent = file;
    this.select = find("select", this.card);
    this.slider = find("input", this.card);
    this.button = find(".download", this.card);
    this.card.setAttribute("aria-label", alone ? name : `Model ${this.letter}: ${name}`);
    if (!alone) this.button.setAttribute("aria-label", `Download panel of model ${this.letter}`);
    this.select.addEventListener("change", () => this.pick());
    this.slider.addEventListener("input", () => this.draw());
    this.button.addEventListener("click", () => download(number, this.button));
    find(".strip", this.card).addEventListener("click", ({ target }) => {
      if (target.dataset.map) this.turn(target.dataset.map);
    });
  }

  show(found) {
    this.found = found;
    find(".body", this.card).hidden = false;
    const photo = find(".photo", this.card);
    Object.assign(photo, { src: found.photo, width: found.width, height: found.height });
    find("ol", this.card).replaceChildren(...found.top.map(([name, text, share]) => {
      const row = document.createElement("li");
      for (const words of [name, text]) row.append(Object.assign(document.createElement("span"), { textContent: words }));
      const bar = row.appendChild(document.createElement("i"));
      bar.style.setProperty("--share", `${100 * share}%`);
      return row;
    }));
    const chosen = this.select.selectedIndex; // stays from image to image, as the subspace does
    this.select.replaceChildren(...found.layers.map(({ heading }, number) => new Option(heading, number)));
    if (found.layers.length) this.select.selectedIndex = Math.max(0, chosen);
    this.pick();
  }

  /** Take up the layer that is selected. */
  pick() {
    const layer = this.found.layers[this.select.selectedIndex];
    if (layer) {
      const value = Math.min(this.slider.value, layer.maps.length);
      this.slider.max = layer.maps.length;
      this.slider.value = value;
      find(".strip", this.card).replaceChildren(...layer.maps.map(([, image], number) => {
        const thumb = Object.assign(new Image(), { src: image, alt: "" });
        thumb.dataset.map = number + 1;
        return thumb;
      }));
    }
    this.draw();
  }

  turn(number) {
    this.slider.value = number;
    this.draw();
  }

  /** Lay the map that is asked for on the image, and say what it is. */
  draw() {
    const mode = find("input:checked", radios).value, { cam, layers } = this.found;
    const layer = mode === "attention" ? layers[this.select.selectedIndex] : undefined;
    const number = Number(this.slider.value), count = layer?.maps.length;
    const [words, image] = layer ? layer.maps[number - 1] : mode === "cam" ? [[`Grad-CAM++ for ${cam.of}`], cam.image] : [[], ""];
    const map = find(".map", this.card), scale = find(".scale", this.card);
    const what = layer ? [`Subspace ${words.join(", ")}`, layer.note].filter(Boolean).join("; ") : words.join("");
    map.hidden = !image;
    if (image) Object.assign(map, { src: image, alt: `${what}; laid over the image` });
    else map.removeAttribute("src");
    find(".photo", this.card).alt = `${file.name}, as model ${this.letter} was given it`;
    find("figcaption", this.card).textContent =
      what || (mode === "attention" ? settings.no_layer : `The image as the model was given it, ${this.found.width} × ${this.found.height}`);
    scale.hidden = !image;
    find(".top", scale).textContent = layer ? layer.top : "its maximum";
    find(".uniform", scale).hidden = !layer || layer.uniform < 18;
    scale.style.setProperty("--uniform", `${layer?.uniform ?? 0}%`);
    find(".controls", this.card).hidden = !layer;
    find(".subspace", this.card).hidden = find(".strip", this.card).hidden = !(count > 1);
    find(".count", this.card).textContent = `${number} of ${count}`;
    this.slider.setAttribute("aria-valuetext", `${number} of ${count}: ${words.join(", ")}`);
    find(".strip", this.card).childNodes.forEach((thumb, place) => thumb.classList.toggle("on", place + 1 === number));
  }
}

// ---------------------------------------------------------------- the page around them

function show({ said, models: found }) {
  body.dataset.state = "shown";
  find("#result").hidden = false;
  find("#name").textContent = file.name;
  find("#said").textContent = said;
  find("#status").textContent = `${file.name}: ${said}`;
  found.forEach((one, number) => models[number].show(one));
}

function busy(on, name) {
  find(".progress").hidden = !on;
  body.classList.toggle("busy", on);
  find("main").setAttribute("aria-busy", on);
  const most = `JPEG, PNG, WebP and others, up to ${settings.max_bytes / 1e6} MB`;
  find("#limits").textContent = on ? `Looking at ${name} …` : most;
  if (on) find("#status").textContent = `Looking at ${name}`;
}

function fail(message) {
  find("#error").textContent = message;
  find("#error").hidden = !message;
  if (message) find("#status").textContent = "";
}

function take(files) {
  if (!settings) return;
  if (files.length === 1) look(files[0]);
  else fail(files.length ? `One image at a time, please: these are ${files.length} files.` : "That was no file.");
}

input.addEventListener("change", () => {
  if (input.files.length) take([...input.files]);
  input.value = ""; // so that the same file can be chosen again
});
addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && take([...clipboardData.files]));
for (const [type, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    body.classList.toggle("over", over);
    if (type === "drop") take([...event.dataTransfer.files]);
  });
}
radios.addEventListener("change", () => models.forEach((model) => model.draw()));
find("#strength").addEventListener("input", ({ target }) => {
  document.documentElement.style.setProperty("--strength", target.value / 100);
});

async function start() {
  try {
    settings = await (await fetch("models")).json();
  } catch {
    return fail("The program does not answer. Is ulsam explore still running?");
  }
  document.documentElement.style.setProperty("--gradient", settings.gradient);
  busy(false);
  models.push(...settings.models.map((model, number) => new Model(model, number, settings.models.length === 1)));
  find("#models").replaceChildren(...models.map((model) => model.card));
  const attention = settings.models.some((model) => model.attention);
  find("[value=attention]", radios).disabled = !attention;
  find("[value=cam]", radios).checked = true;
}

start();
