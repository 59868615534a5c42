"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
if (data) start();
scrollers();
addEventListener("resize", scrollers);
for (const folded of document.querySelectorAll("details")) {
  folded.addEventListener("toggle", scrollers);
}

// A table or figure that is wider than the page can be scrolled with the keyboard.
function scrollers() {
  for (const box of document.querySelectorAll(".wide")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

function start() {
  const get = (id) => document.getElementById(id);
  const names = Object.keys(data.adapters);
  const n = data.classes.length;
  // A set of active layers is a bit mask: bit i is set if layer i is active. `data.adapters` has
  // one entry per mask, with one confusion matrix per strength. Mask 0, no layer, is the base.
  const allLayers = 2 ** data.sites.length - 1;
  const MEAN = data.mean && names.length > 1 ? `mean of ${names.length}` : null;
  // `mask` is the reader's choice. It stays when an adapter has no data for it.
  const state = { adapter: MEAN || names[0], mask: allLayers, cell: null,
    step: data.strengths.indexOf(1) };
  if (state.step < 0) state.step = data.strengths.length - 1;

  const has = (name, mask) => mask === 0 || String(mask) in data.adapters[name];
  const chosen = () => (state.adapter === MEAN ? names : [state.adapter]);
  const having = (mask) => chosen().filter((name) => has(name, mask));
  // The states shown: the mask, and the adapters that have data for it.
  function shown() {
    const members = having(state.mask);
    return members.length ? { mask: state.mask, members } : { mask: allLayers, members: chosen() };
  }
  const confusion = (name, mask) =>
    (mask === 0 ? data.base : data.adapters[name][String(mask)][state.step]);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  function deviation(values) { // the sample standard deviation
    const middle = mean(values);
    const squares = values.map((value) => (value - middle) ** 2);
    return values.length > 1 ? Math.sqrt(mean(squares) * values.length / (values.length - 1)) : 0;
  }
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

  function element(tag, className, text, role) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    if (role) made.setAttribute("role", role);
    return made;
  }

  // Radio buttons: the whole group is one stop of the tab key.
  for (const name of MEAN ? [MEAN, ...names] : names) {
    const choice = element("label", "choice"), input = element("input");
    input.type = "radio";
    input.name = "adapter";
    input.checked = name === state.adapter;
    input.addEventListener("change", () => { state.adapter = name; update(); });
    choice.append(input, element("span", "", name));
    get("adapters").append(choice);
  }
  const layers = data.sites.map((site, number) => {
    const made = element("button", "", site);
    made.type = "button";
    made.setAttribute("aria-describedby", "note");
    made.addEventListener("click", () => { state.mask ^= 1 << number; update(); });
    get("layers").append(made);
    return made;
  });
  get("scope").textContent = data.scope || "";
  const slider = get("strength"), last = data.strengths.length - 1;
  slider.max = last;
  slider.value = state.step;
  slider.addEventListener("input", () => { state.step = Number(slider.value); update(); });
  const sparse = Math.ceil((last + 1) / 10);
  data.strengths.forEach((strength, i) => {
    const tick = element("span", "", i % sparse ? "" : String(strength));
    tick.style.left = `${(100 * i) / Math.max(1, last)}%`;
    get("ticks").append(tick);
  });

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

  const short = (name) => (name.length > 4 ? name.slice(0, 3) + "…" : name);
  function head(c, role) {
    const className = "head" + (data.tuned.includes(c) ? " tuned" : "");
    const made = element("div", className, short(data.classes[c]), role);
    made.setAttribute("aria-label", data.classes[c]);
    return made;
  }
  // The matrix is one stop of the tab key; the arrow keys move between its cells.
  const table = get("cells");
  const columns = `repeat(${n + 1}, minmax(0, 1fr))`;
  table.style.gridTemplateColumns = columns;
  const top = element("div", "", undefined, "row"), corner = element("div", "head", "true", "columnheader");
  top.append(corner, ...every.map((c) => head(c, "columnheader")));
  table.append(top);
  let entry = null;
  function focusable(cell) {
    if (entry) entry.tabIndex = -1;
    entry = cell;
    cell.tabIndex = 0;
  }
  const cells = every.map((label) => {
    const row = element("div", "", undefined, "row");
    row.append(head(label, "rowheader"));
    table.append(row);
    return every.map((answer) => {
      const made = element("button", label === answer ? "right" : "", undefined, "gridcell");
      made.type = "button";
      made.tabIndex = -1;
      made.dataset.cell = `${label}-${answer}`;
      made.addEventListener("click", () => { state.cell = [label, answer]; focusable(made); update(); });
      row.append(made);
      return made;
    });
  });
  focusable(cells[0][0]);
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  table.addEventListener("keydown", (event) => {
    if (!(event.key in moves) || !event.target.dataset.cell) return;
    event.preventDefault();
    const place = event.target.dataset.cell.split("-").map(Number);
    const [row, column] = place.map((at, i) => Math.min(n - 1, Math.max(0, at + moves[event.key][i])));
    focusable(cells[row][column]);
    cells[row][column].focus();
  });

  function pictures(matrix, mask) {
    const box = get("pictures");
    box.replaceChildren();
    if (!state.cell) { box.append(element("p", "key", "Click a cell to see its images.")); return; }
    const [label, answer] = state.cell;
    const title = `${data.classes[label]} predicted as ${data.classes[answer]}: ` +
      `${round(matrix[label][answer])} images`;
    box.append(element("p", "", title));
    const images = data.images;
    if (!images) return;
    if (state.adapter === MEAN && mask) {
      box.append(element("p", "key", "The adapters disagree on the images of a cell: choose one " +
        "adapter above to see its images."));
      return;
    }
    const pictured = Object.keys(images.answers);
    const states = images.answers[mask ? state.adapter : pictured[0]];
    if (!states) {
      box.append(element("p", "key", "Images would make the page large, so it has those of " +
        `${pictured.join(", ")} only. The counts are of all images.`));
      return;
    }
    const predictions = mask === 0 ? states[String(allLayers)][data.strengths.indexOf(0)]
      : states[String(mask)][state.step];
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

  const round = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(1));

  function note(members) {
    const subset = state.mask !== 0 && state.mask !== allLayers;
    const active = data.sites.filter((_, i) => (state.mask >> i) & 1).join(", ");
    if (!having(state.mask).length) {
      return `${state.adapter} was evaluated with all layers only, so all are active. Your choice ` +
        `(${active}) comes back with an adapter that has it.`;
    }
    if (layers.some((button) => button.disabled)) {
      return `${state.adapter} was evaluated with all layers only: a run evaluates the subsets of ` +
        "layers for some adapters, because there are many.";
    }
    return subset && members.length < chosen().length
      ? `Only these were evaluated with this set of layers: ${members.join(", ")}.` : "";
  }

  function update() {
    const { mask, members } = shown();
    const matrices = members.map((name) => confusion(name, mask));
    const matrix = every.map((i) => every.map((j) => mean(matrices.map((one) => one[i][j]))));
    layers.forEach((button, number) => {
      button.setAttribute("aria-pressed", String(Boolean((mask >> number) & 1)));
      button.disabled = !having(mask ^ (1 << number)).length || mask !== state.mask;
    });
    get("note").textContent = note(members);
    const strength = String(data.strengths[state.step]);
    get("shown-strength").textContent = strength;
    slider.setAttribute("aria-valuetext", `strength ${strength}` + (strength === "0" ? ", the base" : ""));
    groups.forEach(([, classes], i) => {
      const values = matrices.map((one) => accuracy(one, classes)), spread = deviation(values);
      const change = mean(values) - accuracy(data.base, classes);
      totals[i][0].textContent = mean(values).toFixed(2) + (spread ? ` ± ${spread.toFixed(2)}` : "") +
        " %";
      totals[i][1].textContent = (change < 0 ? "−" : "+") + Math.abs(change).toFixed(2) +
        " points vs. base" + (members.length > 1 ? `; mean ± sd, n = ${members.length}` : "");
    });
    every.forEach((c) => {
      const value = mean(matrices.map((one) => accuracy(one, [c])));
      bars[c][0].style.width = value + "%";
      bars[c][1].textContent = value.toFixed(1) + " %";
    });
    const highest = Math.max(1, ...matrix.flatMap((row, i) => row.filter((_, j) => i !== j)));
    every.forEach((i) => every.forEach((j) => {
      const cell = cells[i][j], value = matrix[i][j];
      cell.textContent = value >= 10 ? Math.round(value) : value ? round(value) : "";
      cell.style.setProperty("--depth", i === j ? 0 : Math.sqrt(value / highest));
      const picked = Boolean(state.cell && state.cell[0] === i && state.cell[1] === j);
      cell.classList.toggle("chosen", picked);
      cell.setAttribute("aria-selected", String(picked));
      cell.setAttribute("aria-label",
        `${data.classes[i]} predicted as ${data.classes[j]}: ${round(value)}`);
    }));
    pictures(matrix, mask);
  }
  update();
}
