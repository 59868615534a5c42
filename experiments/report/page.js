"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
if (data) start();

function start() {
  const get = (id) => document.getElementById(id);
  const names = Object.keys(data.adapters);
  const n = data.classes.length;
  // A set of active layers is a bit mask: bit i is set if layer i is active. `data.adapters` has one
  // entry per mask, with one confusion matrix per strength. Mask 0, no layer, is the base.
  const allLayers = 2 ** data.sites.length - 1;
  const state = { adapter: names[0], mask: allLayers, step: data.strengths.indexOf(1), cell: null };
  if (state.step < 0) state.step = data.strengths.length - 1;

  const confusion = () => {
    const states = data.adapters[state.adapter];
    return state.mask === 0 ? data.base : states[String(state.mask)][state.step];
  };
  const accuracy = (matrix, classes) => { // in %
    let correct = 0, all = 0;
    for (const c of classes) { correct += matrix[c][c]; for (const v of matrix[c]) all += v; }
    return all ? (100 * correct) / all : NaN;
  };
  const every = [...Array(n).keys()];
  const groups = [["all", every]];
  if (data.tuned.length) {
    groups.push(["tuned", data.tuned], ["other", every.filter((c) => !data.tuned.includes(c))]);
  }

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function toggle(parent, text, press) {
    const made = element("button", "", text);
    made.type = "button";
    made.addEventListener("click", () => { press(); update(); });
    parent.append(made);
    return made;
  }

  const adapters = names.map((name) => [name,
    toggle(get("adapters"), name, () => { state.adapter = name; fit(); })]);
  const layers = data.sites.map((site, number) => toggle(get("layers"), site,
    () => { state.mask ^= 1 << number; }));
  const slider = get("strength");
  slider.max = data.strengths.length - 1;
  slider.value = state.step;
  slider.addEventListener("input", () => { state.step = Number(slider.value); update(); });

  function fit() { // Some adapters have data for the full set of layers only.
    if (state.mask && !(String(state.mask) in data.adapters[state.adapter])) state.mask = allLayers;
  }

  const totals = groups.map(([name]) => {
    const box = element("div"), value = element("b"), change = element("small");
    box.append(element("span", "", "accuracy, " + name + " classes"), value, change);
    get("totals").append(box);
    return [value, change];
  });
  const bars = every.map((c) => {
    const row = element("div", "bar" + (data.tuned.includes(c) ? " tuned" : ""));
    const track = element("div", "track"), fill = element("div", "fill");
    const mark = element("div", "mark"), value = element("span");
    mark.style.left = `calc(${accuracy(data.base, [c])}% - 1px)`;
    track.append(fill, mark);
    row.append(element("span", "", data.classes[c]), track, value);
    get("bars").append(row);
    return [fill, value];
  });

  const table = get("cells");
  table.style.gridTemplateColumns = `repeat(${n + 1}, minmax(0, 1fr))`;
  const short = (c) => data.classes[c].length > 4 ? data.classes[c].slice(0, 3) + "…" : data.classes[c];
  const head = (c) => element("div", "head" + (data.tuned.includes(c) ? " tuned" : ""), short(c));
  table.append(element("div", "head", ""));
  every.forEach((c) => table.append(head(c)));
  const cells = every.map((label) => {
    table.append(head(label));
    return every.map((answer) => {
      const made = element("button");
      made.type = "button";
      made.dataset.cell = `${label}-${answer}`;
      made.addEventListener("click", () => { state.cell = [label, answer]; update(); });
      table.append(made);
      return made;
    });
  });

  function pictures(matrix) {
    const box = get("pictures");
    box.replaceChildren();
    if (!state.cell) { box.append(element("p", "key", "Click a cell to see its images.")); return; }
    const [label, answer] = state.cell;
    const title = `${data.classes[label]} predicted as ${data.classes[answer]}: ` +
      `${matrix[label][answer]} images`;
    box.append(element("p", "", title));
    const images = data.images;
    if (!images) return;
    const states = images.answers[state.adapter];
    const predictions = state.mask === 0 ? states[String(allLayers)][data.strengths.indexOf(0)]
      : states[String(state.mask)][state.step];
    const grid = element("div", "grid"), zoom = Math.max(1, Math.round(56 / images.width));
    const width = images.width * zoom, height = images.height * zoom;
    predictions.forEach((predicted, i) => {
      if (images.labels[i] !== label || predicted !== answer) return;
      // Each image is a window onto the sprite sheet, which is moved so that image i is in view.
      const column = i % images.columns, row = Math.floor(i / images.columns);
      const picture = element("div");
      picture.style.width = `${width}px`;
      picture.style.height = `${height}px`;
      picture.style.backgroundImage = `url(${images.sprite})`;
      picture.style.backgroundSize = `${images.columns * width}px auto`;
      picture.style.backgroundPosition = `-${column * width}px -${row * height}px`;
      grid.append(picture);
    });
    box.append(grid);
    const count = grid.childElementCount;
    const text = count < matrix[label][answer] ? `${count} of these images are shown` : "";
    box.append(element("p", "key", text));
  }

  function update() {
    const matrix = confusion();
    for (const [name, button] of adapters) {
      button.setAttribute("aria-pressed", String(name === state.adapter));
    }
    layers.forEach((button, number) => {
      button.setAttribute("aria-pressed", String(Boolean(state.mask >> number & 1)));
      const next = state.mask ^ (1 << number);
      button.disabled = next !== 0 && !(String(next) in data.adapters[state.adapter]);
    });
    get("shown-strength").textContent = data.strengths[state.step];
    groups.forEach(([, classes], i) => {
      const value = accuracy(matrix, classes), change = value - accuracy(data.base, classes);
      totals[i][0].textContent = value.toFixed(2) + " %";
      totals[i][1].textContent = (change < 0 ? "−" : "+") + Math.abs(change).toFixed(2) +
        " points vs. base";
    });
    every.forEach((c) => {
      const value = accuracy(matrix, [c]);
      bars[c][0].style.width = value + "%";
      bars[c][1].textContent = value.toFixed(1) + " %";
    });
    const highest = Math.max(1, ...matrix.flatMap((row, i) => row.filter((_, j) => i !== j)));
    every.forEach((i) => every.forEach((j) => {
      const cell = cells[i][j], value = matrix[i][j];
      cell.textContent = value || "";
      const depth = i === j ? 0 : Math.sqrt(value / highest);
      cell.style.background = i === j ? "#e8eef2" : `rgb(255 ${255 - 150 * depth} ${255 - 255 * depth})`;
      const chosen = state.cell && state.cell[0] === i && state.cell[1] === j;
      cell.classList.toggle("chosen", Boolean(chosen));
      cell.setAttribute("aria-label", `${data.classes[i]} predicted as ${data.classes[j]}: ${value}`);
    }));
    pictures(matrix);
  }
  update();
}
