// Written by tools/tangle.py from book/a1_figures.ipynb: change it there.

// The hash FNV-1a of a text, 32 bits as eight hexadecimal digits.
function fnv1a(text) {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) {
    value = Math.imul(value ^ byte, 0x01000193);
  }
  return (value >>> 0).toString(16).padStart(8, "0");
}

// How far a result lies outside a range [low, high], from 0 (within) to 1; null is no limit.
function distance(result, range) {
  if (result === null || !range) return 0;
  const [low, high] = range;
  let bound = result;
  if (low !== null && result < low) bound = low;
  if (high !== null && result > high) bound = high;
  return bound === result ? 0 : Math.abs(result - bound) / (Math.abs(result) + Math.abs(bound));
}

// The examinations that tell a patient from a fault, the clearest first.
function contradictions(results, expected, examinations) {
  const far = ({ index }) => distance(results[index], expected[index]);
  return examinations.filter(far).sort((one, other) => far(other) - far(one));
}

const plain = (value, digits) => value.toFixed(digits).replace("-", "−");

function rangeInWords([low, high], digits) {
  if (low === null) return `at most ${plain(high, digits)}`;
  if (high === null) return `at least ${plain(low, digits)}`;
  const ends = [plain(low, digits), plain(high, digits)];
  return ends[0] === ends[1] ? ends[0] : ends.join(" to ");
}

// What the page says to a wrong name. expected: of the guessed fault.
function objection(title, { results }, expected, examinations, opened) {
  const guess = title[0].toUpperCase() + title.slice(1);
  const all = contradictions(results, expected, examinations);
  const seen = all.find((one) => opened.has(one));
  if (seen) {
    const { index, digits } = seen;
    const range = rangeInWords(expected[index], digits);
    return `${guess}? Then “${seen.title}” would give ${range}; here it is ${
      plain(results[index], digits)}.`;
  }
  const [better] = all.sort((one, other) => one.price - other.price); // and the clearest of these
  if (better) {
    return `${guess}? Your examinations don’t rule it out. This one would: “${
      better.title}” (price ${better.price}).`;
  }
  return `${guess}? It is not that, but no examination here tells the two apart.`;
}

// The path of a curve; `across` and `up` turn a point into its place on the screen.
function curve(x, y, across, up) {
  let path = "", pen = "M";
  y.forEach((value, i) => {
    if (value === null) pen = "M";
    else {
      path += `${pen}${across(x[i]).toFixed(1)} ${up(value).toFixed(1)}`;
      pen = "L";
    }
  });
  return path;
}

const ends = (name, y) => {
  const known = y.filter((value) => value !== null);
  return known.length ? `${name} from ${plain(known[0], 2)} to ${plain(known.at(-1), 2)}` : `no ${name}`;
};

// One panel of curves. curves: { name, kind, x, y }; band: { x, y: [[low, high], ...] }.
function panel(width, { title, unit, axis, range: [low, high], log, band, lines = {}, curves }) {
  const height = 150, left = log ? 37 : 20, top = 9, bottom = 131;
  const right = width - (Object.keys(lines).length ? 40 : 8);
  const first = curves[0].x[0], last = Math.max(...curves.map(({ x }) => x.at(-1)));
  const scale = log ? (value) => Math.log10(Math.max(value, 1e-9)) : (value) => value;
  const share = (value) => (scale(value) - scale(low)) / (scale(high) - scale(low));
  const up = (value) => bottom - (bottom - top) * Math.min(Math.max(share(value), 0), 1);
  const across = (value) => left + ((right - left) * (value - first)) / (last - first);
  const letters = (x, y, text, anchor) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${text}</text>`;
  const ticks = log ? [0.0001, 0.001, 0.01, 0.1, 1, 10, 100, 1000] : [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
  const shown = ticks.filter((value) => value >= low && value <= high);
  let inside = `<path class="axis" d="M${left} ${top}V${bottom}H${right}"/>`;
  for (const value of shown) {
    inside += letters(left - 4, up(value) + 4, value, "end");
  }
  inside += letters(left, 146, first, "start") + letters(right, 146, last, "end");
  inside += letters((left + right) / 2, 146, axis, "middle");
  const edge = (side) => curve(band.x, band.y.map((ends) => ends[side]), across, up);
  const back = curve([...band.x].reverse(), band.y.map((ends) => ends[0]).reverse(), across, up);
  inside += `<path class="band" d="${edge(1)}${back.replace("M", "L")}Z"/>`;
  for (const [name, value] of Object.entries(lines)) {
    inside += `<path class="line" d="M${left} ${up(value)}H${right}"/>`;
    inside += letters(right + 3, up(value) + 4, name, "start");
  }
  curves.forEach(({ kind, x, y }) => {
    inside += `<path class="curve ${kind}" d="${curve(x, y, across, up)}"/>`;
    const most = Math.max(...y);
    if (most > high && !log) inside += letters(left + 5, top + 4, `▲ up to ${plain(most, 1)}`, "start");
  });
  const words = `${title}, ${unit}: ${curves.map(({ name, y }) => ends(name, y)).join("; ")}.`;
  const keys = curves.map(({ name, kind }) => `<span class="${kind}">${name}</span>`).join("");
  return `<p class="title">${title}</p><p class="keys">${keys}</p><svg viewBox="0 0 ${width} ${height}"
    width="${width}" height="${height}" role="img" aria-label="${words}">${inside}</svg>`;
}

// Draw a map of weights, two digits for each in hundredths; returns it in words.
function drawMap(canvas, digits) {
  const weights = digits.match(/../g).map(Number), size = Math.sqrt(weights.length);
  const paper = canvas.getContext("2d");
  let above = 0, on = 0;
  canvas.width = canvas.height = size;
  weights.forEach((weight, i) => {
    const row = Math.floor(i / size), column = i % size;
    if (column > row) above += weight / size;
    if (column === row) on += weight / size;
    paper.fillStyle = `rgb(42 102 240 / ${Math.min(1, weight / 60)})`;
    paper.fillRect(column, row, 1, 1);
  });
  return `Attention of the first block, queries down, keys across: of a row, ${
    above.toFixed(0)} % lie above the diagonal, ${on.toFixed(0)} % on it.`;
}

const highest = (losses) => Math.max(4.6, 1.05 * Math.max(...losses));

// Draw the chart of a patient into a box.
function drawChart(box, chart, band, lines) {
  const { steps, positions, norm } = chart, judged = chart["held out steps"];
  const columns = box.clientWidth < 560 ? 2 : 3;
  const width = Math.floor((box.clientWidth - 12 * (columns - 1)) / columns);
  const wide = columns === 2 ? box.clientWidth : width;
  const places = positions.map((_, i) => i + 1);
  const norms = Object.values(norm).flat().filter((value) => value > 0);
  const one = (name, y, x = steps) => ({ name, kind: "one", x, y });
  const two = (name, y, x = steps) => ({ name, kind: "two", x, y });
  const three = (name, y) => ({ name, kind: "three", x: steps, y });
  const panels = [
    panel(wide, { title: "Loss", unit: "nats", axis: "step", range: [0, highest(chart["held out"])],
      band: { x: band.steps, y: band.training }, lines,
      curves: [one("training", chart.training), two("held out", chart["held out"], judged)] }),
    panel(width, { title: "Norm of the gradient", unit: "by part", axis: "step", log: true,
      range: [Math.min(0.1, ...norms), Math.max(10, ...norms)], band: { x: band.steps, y: band.norm },
      curves: [one("all", norm.all), two("blocks", norm.blocks), three("table", norm.table)] }),
    panel(width, { title: "Entropy and spread", unit: "nats, and logits", axis: "step",
      range: [0, Math.max(5, ...chart.spread)], band: { x: band.steps, y: band.entropy },
      curves: [one("entropy", chart.entropy), two("spread of logits", chart.spread)] }),
    panel(width, { title: "Loss by position", unit: "nats", axis: "position",
      range: [0, highest(positions)], band: { x: places, y: band.positions },
      curves: [two("held out", positions, places)] }),
    `<p class="title">Attention, first block</p><p class="keys">keys →, queries ↓</p>
      <canvas role="img"></canvas>`,
    `<p class="title">A text it wrote</p><p class="words" tabindex="0"></p>`,
  ];
  box.innerHTML = panels.map((inside) => `<div>${inside}</div>`).join("");
  const canvas = box.querySelector("canvas");
  canvas.setAttribute("aria-label", drawMap(canvas, chart.map));
  box.querySelector(".words").textContent = chart.text;
}

const ROOM = `<p class="field"><label>Patient <select class="patient" autocomplete="off"></select></label></p>
<div class="chart" role="group"></div>
<p class="title">Examinations <span class="paid"></span></p>
<ul></ul>
<p class="field"><label>What is wrong? <select class="name" autocomplete="off"></select></label>
<button type="button" class="answer">Answer</button></p>
<p class="said" role="status"></p>
<button type="button" class="next" hidden>Next patient</button>
<span class="glass-spoken" aria-live="polite"></span>`;

const EXAMINATION = `<button type="button" aria-expanded="false"><span></span><small></small></button>
<p hidden><b></b><span></span></p>`;

// The number of an examination, and what there is to say about it.
function finding({ index, unit, digits, healthy, finds }, { results }) {
  const result = results[index];
  if (result === null) return ["no number", ": this cannot be done here"];
  const is = distance(result, healthy) ? `; outside: ${finds}` : "; within";
  const about = unit ? ` (${unit})` : "";
  return [plain(result, digits), `${about}; healthy: ${rangeInWords(healthy, digits)}${is}`];
}

function startWard(ward) {
  const record = JSON.parse(ward.querySelector("script").textContent);
  const { patients, examinations, faults, expected } = record;
  const room = document.createElement("div");
  room.className = "room";
  room.innerHTML = ROOM;
  ward.append(room);
  ward.classList.add("alive");
  const find = (name) => room.querySelector(name);
  const chooser = find(".patient"), names = find(".name"), said = find(".said");
  let patient = patients[0], width = 0;

  const draw = () => drawChart(find(".chart"), patient.chart, record.band, record.lines);
  const paid = () => [...patient.opened].reduce((sum, { price }) => sum + price, 0);
  const rows = examinations.map((examination, index) => {
    const row = document.createElement("li");
    row.innerHTML = EXAMINATION;
    examination.index = index;
    row.querySelector("span").textContent = examination.title;
    row.querySelector("small").textContent = `price ${examination.price}`;
    row.firstChild.onclick = () => {
      patient.opened.add(examination);
      show();
      const number = finding(examination, patient).join("");
      find(".glass-spoken").textContent = `${number}. Price so far: ${paid()}.`;
    };
    return row;
  });
  find("ul").append(...rows);
  // JupyterLab leaves the keys to what has this attribute itself.
  for (const control of room.querySelectorAll("select, button")) {
    control.dataset.lmSuppressShortcuts = "true";
  }

  // Write what is known of the patient.
  function show() {
    find(".paid").textContent = `price so far: ${paid()}`;
    said.textContent = patient.said;
    said.dataset.state = patient.state;
    find(".next").hidden = patient.state !== "right";
    rows.forEach((row, index) => {
      const open = patient.opened.has(examinations[index]);
      row.firstChild.setAttribute("aria-expanded", open);
      const [number, rest] = open ? finding(examinations[index], patient) : ["", ""];
      row.lastChild.hidden = !open;
      row.lastChild.firstChild.textContent = number;
      row.lastChild.lastChild.textContent = rest;
    });
  }

  function choose(next) {
    patient = next;
    chooser.value = names.value = "";
    chooser.value = patient.number;
    find(".chart").setAttribute("aria-label", `Chart of patient ${patient.number}`);
    draw();
    show();
  }

  function answer() {
    const fault = faults.find(({ name }) => name === names.value), { opened } = patient;
    if (patient.state === "right") return;
    if (!fault) patient.said = "Choose a name first.";
    else if (fnv1a(`${patient.number}:${fault.name}`) === patient.answer) {
      patient.said = `Right: ${fault.title}. You paid ${paid()} (examinations: ${
        opened.size}). The order of examinations pays ${patient.price}.`;
      patient.state = "right";
      chooser.selectedOptions[0].textContent = `${patient.number}: ${fault.title}`;
    } else {
      patient.said = objection(fault.title, patient, expected[fault.name], examinations, opened);
      patient.state = "wrong";
    }
    show();
  }

  const groups = new Map([["none", names]]);
  names.append(new Option("choose a name", ""));
  for (const { name, group, title } of faults) {
    if (!groups.has(group)) {
      const list = document.createElement("optgroup");
      list.label = group;
      groups.set(group, list);
      names.append(list);
    }
    groups.get(group).append(new Option(title, name));
  }
  for (const one of patients) {
    Object.assign(one, { opened: new Set(), said: "", state: "" });
    chooser.append(new Option(one.number, one.number));
  }
  chooser.onchange = () => choose(patients.find(({ number }) => number === +chooser.value));
  find(".answer").onclick = answer;
  find(".next").onclick = () => {
    const from = patients.indexOf(patient) + 1;
    const others = [...patients.slice(from), ...patients];
    choose(others.find(({ state }) => state !== "right") ?? patient);
    chooser.focus();
  };
  choose(patient);
  new ResizeObserver(() => {
    if (!room.clientWidth || room.clientWidth === width) return;
    width = room.clientWidth;
    draw();
  }).observe(room);
}
