// Written by tools/tangle.py from book/a4_publishing.ipynb: change it there.

// A thread of its own for the engine, so that the page never waits: ask(question, ...).
function startEngine(stored) {
  const source = new Blob([`(${engine})()`], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(source)), waiting = [];
  worker.onmessage = ({ data: { answer, error } }) => {
    const { resolve, reject } = waiting.shift(); // in the order of the questions
    if (error) reject(new Error(error));
    else resolve(answer);
  };
  const ask = (...question) => new Promise((resolve, reject) => {
    waiting.push({ resolve, reject });
    worker.postMessage(question);
  });
  ask("open", stored);
  return ask;
}

// What the reader sees, and hears, of a token.
const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => text.replace(/[&<>"]/g, (sign) => escapes[sign]);
const visible = (piece) => escaped(piece).replaceAll("\n", "<small>↵</small>");
const spoken = (piece) =>
  piece.replaceAll("\n", "new line").replace(/^ +$/, "space").replace(/^ /, "space, ");
const percent = (share) => `${(100 * share).toFixed(1)}%`;

// A panel: its HTML, what connects its buttons, what draws it when the text changes.
const PANELS = {};

const GUESS = `<button><span role="img"></span><i></i><b></b></button>`;

PANELS.next = {
  html: () => `<p class="title"></p>
    <div class="guesses" role="group" aria-label="Choose one">${GUESS.repeat(10)}</div>
    <p class="count"></p>`,
  start(figure, find) {
    find("div").onclick = ({ target }) => {
      const { ids, position } = figure.text, row = target.closest("button");
      if (!row) return;
      const cut = position + 1 < ids.length ? ", and what followed is cut off" : "";
      const news = `“${row.firstChild.textContent}” is chosen${cut}.`;
      figure.become([...ids.slice(0, position + 1), +row.value], news);
    };
  },
  async update({ ask, settings, text: { ids, position, piece } }, find) {
    const { kept, choices } = await ask("next", ids, position, settings, 10);
    find(".title").innerHTML = `The next token, after “${visible(piece)}”`;
    const rows = find.all("button");
    const focused = rows.findIndex((row) => row.matches(":focus"));
    if (focused >= choices.length) rows[choices.length - 1].focus();
    rows.forEach((row, i) => {
      row.hidden = i >= choices.length;
      if (row.hidden) return;
      const { id, piece, probability } = choices[i];
      const [token, bar, number] = row.children;
      row.value = id;
      token.setAttribute("aria-label", `${spoken(piece)}, `);
      token.innerHTML = visible(piece);
      bar.style.width = `${(100 * probability) / choices[0].probability}%`;
      number.textContent = percent(probability);
    });
    find(".count").textContent = `Tokens that can be drawn: ${kept}`;
  },
};

PANELS.tokens = {
  html: () => `<p class="title" id="tokens">Tokens</p><div class="tokens" role="listbox"
    tabindex="0" aria-labelledby="tokens"></div><p role="status"></p>`,
  start(figure, find) {
    const box = find(".tokens");
    const place = ({ target }) => find.all("span").indexOf(target.closest("span"));
    box.onclick = (event) => figure.select(place(event));
    box.onpointerover = (event) => figure.hover(place(event));
    box.onpointerleave = () => figure.hover(-1);
    box.onkeydown = (event) => {
      const { first, ids, position: at } = figure.text;
      const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1,
        ArrowDown: at + 1, Home: first, End: ids.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      figure.select(to);
    };
  },
  update({ text: { pieces, position, first }, writing, news }, find) {
    const box = find(".tokens"), shown = box.shown ?? [];
    let same = 0; // tokens that stand there already
    while (same < pieces.length && pieces[same] === shown[same]) same += 1;
    while (box.childElementCount > same) box.lastElementChild.remove();
    box.insertAdjacentHTML("beforeend", pieces.slice(same).map((piece, i) =>
      `<div><span role="option" id="token${same + i}" aria-label="${escaped(spoken(piece))}"
        >${visible(piece)}</span>${"<br>".repeat(piece.split("\n").length - 1)}</div>`
    ).join(""));
    box.shown = pieces;
    find.all("span").forEach((token, i) => {
      token.setAttribute("aria-selected", i === position);
      token.setAttribute("aria-disabled", i < first);
    });
    box.setAttribute("aria-activedescendant", `token${position}`);
    const chosen = find.all("span")[position];
    const above = chosen.offsetTop - box.offsetTop;
    const below = above + chosen.offsetHeight - box.clientHeight;
    if (above < box.scrollTop) box.scrollTop = above;
    if (below > box.scrollTop) box.scrollTop = below;
    if (!writing && find("[role=status]").textContent !== news) {
      find("[role=status]").textContent = news;
    }
  },
};

PANELS.write = {
  html: () => `<p class="title" id="prompt">Prompt</p>
    <textarea rows="2" spellcheck="false" aria-labelledby="prompt"
      placeholder="The beginning of a text"></textarea>
    <div class="buttons"><button class="main"></button>
    <button>One token</button><button>Start over</button></div>`,
  start(figure, find) {
    const text = find("textarea"), [main, one, over] = find.all("button");
    text.value = figure.prompt;
    text.oninput = over.onclick = () => figure.begin(text.value);
    main.onclick = () => {
      if (figure.writing || figure.playing) figure.stop();
      else figure.write(200);
    };
    one.onclick = () => figure.writing || figure.write(1);
  },
  update({ writing, playing }, find) {
    find(".main").textContent = writing || playing ? "Stop" : "Write";
  },
};

function slider(name, max, value, { min = 1, step = 1 } = {}) {
  return `<label>${name} <input type="range" name="${name}" min="${min}" max="${max}"
    step="${step}" value="${value}" data-lm-suppress-shortcuts="true">
    <output aria-hidden="true"></output></label>`;
}

PANELS.sampling = {
  html: ({ settings }) =>
    slider("temperature", 2, settings.temperature, { min: 0.1, step: 0.1 })
    + slider("top-k", 9, 9, { min: 0 })
    + slider("top-p", 1, 1, { min: 0.05, step: 0.05 }),
  start(figure, find) {
    const [temperature, k, p] = find.all("input");
    const most = [1, 2, 3, 5, 10, 20, 50, 100, 200, Infinity];
    figure.controls(find, () => {
      const topK = most[k.value];
      figure.settings = { temperature: +temperature.value, topK, topP: +p.value };
      return [temperature.value, topK === Infinity ? "all" : topK, p.value];
    });
  },
};

PANELS.attention = {
  html: ({ sizes }) => `<p class="title">Attention</p>
    ${slider("layer", sizes.layers, 1)}
    ${slider("head", sizes.heads, 1)}
    <p class="told" aria-live="polite"></p>
    <p>The stronger the color of a token, the more the head looks at it.</p>`,
  start(figure, find) {
    figure.controls(find, () => find.all("input").map((input) => input.value));
    figure.hover = (place) => {
      figure.hovered = place;
      this.update(figure, find);
    };
  },
  async update(figure, find) {
    const { ids, pieces, position, first } = figure.text;
    const { hovered } = figure, there = first <= hovered && hovered < ids.length;
    const from = there ? hovered : position;
    const [layer, head] = find.all("input").map((input) => input.value - 1);
    const weights = [...await figure.ask("weights", ids, from, layer, head)];
    const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]);
    const most = weights[order[0]]; // it gets the strongest color
    const box = figure.shadowRoot.querySelector(".tokens");
    box?.classList.add("shaded");
    box?.querySelectorAll("span").forEach((token, i) => {
      token.style.setProperty("--weight", (weights[i - first] ?? 0) / most);
    });
    if (figure.writing) return; // too fast to be read, or heard
    const told = order.slice(0, 3).map((i) =>
      `“${visible(pieces[first + i])}” ${percent(weights[i])}`);
    find(".told").innerHTML = `“${visible(pieces[from])}” looks at ${told.join(", ")}.`;
  },
};

PANELS.lens = {
  html: () => `<p class="title"></p>
    <div class="wide" tabindex="0" role="group" aria-label="Guesses of each block">
    <table></table></div>`,
  async update({ ask, writing, text: { ids, position, piece } }, find) {
    if (writing) return;
    const cell = ({ piece, probability }) =>
      `<td><code>${visible(piece)}</code> ${percent(probability)}</td>`;
    const rows = (await ask("lens", ids, position, 3)).map((guesses, layer) =>
      `<tr><th scope="row">${layer ? `block ${layer}` : "embedding"}</th>
        ${guesses.map(cell).join("")}</tr>`);
    find(".title").innerHTML = `The next token as each block sees it, at
      temperature 1, after “${visible(piece)}”`;
    find("table").innerHTML = rows.join("");
  },
};

PANELS.pass = {
  html: ({ sizes }) => `<p class="title">One pass, step by step</p>
    ${slider("step", 4 * sizes.layers + 4, 1)}<p class="told"></p>
    <div class="strip" aria-hidden="true"></div><p class="numbers"></p>`,
  start(figure, find) {
    figure.controls(find, () => [find("input").value]);
  },
  async update({ ask, writing, text: { ids, position } }, find) {
    if (writing) return;
    const steps = await ask("pass", ids, position);
    const { does, vector } = steps[find("input").value - 1];
    const largest = vector.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
    find(".told").textContent = `${does}: blue is positive, red negative`;
    const color = (x) => `background:${x < 0 ? "#d2142d" : "#2a66f0"};
      opacity:${Math.abs(x) / largest}`;
    find(".strip").innerHTML =
      [...vector].map((x) => `<i style="${color(x)}"></i>`).join("");
    const first = [...vector.slice(0, 6)].map((x) => x.toFixed(2)).join(", ");
    find(".numbers").textContent = `${first}, ... (${vector.length} numbers)`;
  },
};

PANELS.chat = {
  html: () => `<label>System
    <input name="system" placeholder="how it should answer"></label>
    <div role="log" aria-label="Conversation" tabindex="0"></div>
    <p role="status"></p>
    <form><input name="message" aria-label="Your message" placeholder="Your message"
      autocomplete="off">
    <button class="main">Send</button><button type="button">Start over</button></form>`,
  start(figure, find) {
    const log = find("[role=log]"), status = find("[role=status]");
    const message = find("[name=message]"), system = find("[name=system]");
    let turns = [], busy = false, forgotten = "";
    const tell = (said, words) => {
      said.textContent = words;
      log.scrollTop = log.scrollHeight;
      return said;
    };
    const say = (role, words) => {
      log.insertAdjacentHTML("beforeend",
        `<p class="said"><b>${role}</b> <span></span></p>`);
      return tell(log.lastChild.lastChild, words);
    };
    const talk = async (content) => {
      const mine = turns, asked = { role: "user", content };
      const [ids, news] = await figure.conversation(system.value, mine, asked);
      if (mine !== turns) return; // somebody started over
      forgotten = news || forgotten;
      message.value = "";
      mine.push(asked);
      say("User", content);
      const answer = say("Assistant", "");
      await figure.become(ids);
      status.textContent = forgotten;
      const each = async () =>
        tell(answer, await figure.ask("decode", figure.ids.slice(ids.length)));
      // Unless somebody chose another text meanwhile.
      if (figure.ids === ids) await figure.write(figure.sizes.context, each);
      mine.push({ role: "assistant", content: answer.textContent });
    };
    find("form").onsubmit = async (event) => {
      event.preventDefault();
      const content = message.value.trim();
      if (figure.writing) figure.stop();
      else if (!busy && content) {
        busy = true;
        status.textContent = "The model reads.";
        await talk(content).catch((error) => { status.textContent = error.message; });
        busy = false;
      }
    };
    find(".main").onclick = (event) => {
      if (event.detail > 1) event.preventDefault(); // the second click of two
    };
    find("[type=button]").onclick = () => {
      turns = [];
      log.replaceChildren();
      status.textContent = "The conversation is empty.";
      forgotten = "";
      figure.begin("");
    };
  },
  update({ writing }, find) {
    find(".main").textContent = writing ? "Stop" : "Send";
    find("[role=log]").setAttribute("aria-busy", writing); // heard when it is whole
  },
};

const STYLE = `
:host{display:block;margin:1rem 0;font:1rem/1.45 system-ui,sans-serif}
.live{display:grid;gap:.9rem;max-width:42rem;margin:auto}
.live[hidden],.live:not([hidden])~slot{display:none}
@media print{:host{min-height:0!important}.buttons,label,form{display:none!important}
.tokens,[role=log]{height:auto!important;max-height:none!important}
:host([show]) .live{display:none!important}:host([show]) .live~slot{display:block!important}}
.title{margin:0 0 .3rem;font-weight:600}
p{margin:.2rem 0}
[role=status]{min-height:1.45em}
textarea,input:not([type=range]){font:inherit;width:100%;box-sizing:border-box;
padding:.4rem .6rem;color:inherit;background:none;border:1px solid #8f8f8f;
border-radius:4px}
form,.buttons{display:flex;flex-wrap:wrap;gap:.5rem;margin-top:.4rem}
form input{flex:1 1 14rem}
::placeholder{color:inherit;opacity:.7}
button{font:inherit;min-height:2.5rem;padding:.2rem .9rem;cursor:pointer;color:inherit;
background:none;border:1px solid #8f8f8f;border-radius:4px}
button.main{background:#a6101f;border-color:#a6101f;color:#fff}
:focus-visible{outline:3px solid #2a66f0;outline-offset:2px}
.tokens{font:.95rem/2 ui-monospace,Menlo,Consolas,monospace;max-height:14rem;
overflow:auto;padding:.3rem}
.tokens div{display:inline}
:host([plays]) .tokens{height:8rem}
.tokens span{display:inline-block;max-width:100%;white-space:pre-wrap;
padding:.2em .1em;margin:0 1px;border-radius:3px;
cursor:pointer;background:#e83e8c26;box-decoration-break:clone}
.tokens div:nth-child(even) span{background:#e83e8c52}
.tokens.shaded div span{background:rgb(160 80 180/calc(.6*var(--weight,0)));
box-shadow:inset 0 0 0 1px #8f8f8f66}
.tokens span[aria-selected=true]{outline:2px solid #d2142d}
.tokens span[aria-disabled=true]{text-decoration:line-through;cursor:default}
[hidden]{display:none!important}
.guesses [hidden]{display:grid!important;visibility:hidden}
.guesses{display:grid;gap:2px}
.guesses button{display:grid;grid-template-columns:7.5em 1fr 4.2em;gap:.5rem;
align-items:center;min-height:1.75rem;padding:0;border:0;text-align:left}
.guesses button:hover{background:#8f8f8f33}
.guesses span{justify-self:end;max-width:100%;box-sizing:border-box;overflow:hidden;
padding:0 .4rem;border:1px solid #8f8f8f;border-radius:4px;white-space:pre;
font:.95rem ui-monospace,Menlo,Consolas,monospace}
.guesses i{background:#8f8f8f;height:.9em;min-width:1px;border-radius:2px}
.guesses i,.strip i{forced-color-adjust:none}
label{display:grid;grid-template-columns:7em 1fr 3.5em;gap:.5rem;align-items:center}
label input{width:100%;height:2rem;margin:0;cursor:pointer}
output,td,.guesses b{font-weight:400;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;font-weight:400;padding:.15rem .5rem .15rem 0}
code{font:.95rem ui-monospace,Menlo,Consolas,monospace;white-space:pre}
.strip{display:flex;height:1.6rem;border:1px solid #8f8f8f}
.strip i{flex:1}
@media(pointer:coarse){.tokens{line-height:2.5}.tokens span{padding:.4em .45em}
.guesses{gap:6px}}
.said{white-space:pre-wrap;overflow-wrap:anywhere}
.wide{overflow-x:auto}
[role=log]{max-height:24rem;overflow:auto;margin-top:.5rem}
label:not(:has(output)){grid-template-columns:7em 1fr}
small{font:inherit;user-select:none}
.writing :is(.told,table){opacity:.4}
@media(forced-colors:active){.tokens span{border:1px solid}}
`;

// The model stands in the page already, or in a script beside this one.
const here = document.currentScript.src;
let loading;

function loadModel() {
  if (globalThis.glassModel) return glassModel;
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("shakespeare.js", here);
    script.onload = () => resolve(glassModel);
    script.onerror = () => {
      loading = undefined; // so that it can be tried again
      reject(new Error("The model did not load."));
    };
    document.head.append(script);
  });
  return loading;
}

// About how high each panel is, in pixels.
const HEIGHTS = { write: 150, tokens: 130, next: 380, sampling: 120, attention: 170,
  lens: 200, pass: 170, chat: 200 };
const ON_A_PHONE = { ...HEIGHTS, attention: 210, lens: 290, pass: 210 };

class GlassGPT extends HTMLElement {
  ids = []; // the text that is wanted; `text` is the one that is shown
  hovered = -1;
  shows = 0;
  runs = 0;
  hover = () => {};

  connectedCallback() {
    if (this.shadowRoot) return;
    this.onkeydown = (event) => { // or a / that is typed would open the search
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    };
    this.attachShadow({ mode: "open" }).innerHTML =
      `<style>${STYLE}</style><div class="live" hidden></div><slot></slot>
      <p class="loading" role="status"></p>`;
    const names = this.getAttribute("show")?.split(" ") ?? [];
    const heights = innerWidth < 600 ? ON_A_PHONE : HEIGHTS;
    const height = names.reduce((sum, name) => sum + heights[name], 0);
    this.style.minHeight = `${height}px`; // so that the page doesn't jump
    const watcher = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) return;
      watcher.disconnect();
      this.load();
    }, { rootMargin: "800px" });
    watcher.observe(this);
  }

  async load() {
    const status = this.shadowRoot.querySelector(".loading");
    status.textContent = "The model is loading.";
    try {
      await this.start(await loadModel());
      status.remove();
    } catch (error) {
      status.innerHTML = `${escaped(error.message)} <button>Try again</button>`;
      status.lastChild.onclick = () => this.load();
    }
  }

  async start(stored) {
    const live = this.shadowRoot.querySelector(".live");
    live.replaceChildren();
    this.ask = startEngine(stored);
    this.sizes = stored.config;
    this.emptyPrompt = stored.tokenizer.start;
    this.prompt = this.getAttribute("prompt") ?? stored.prompt;
    this.settings = { temperature: Number(this.getAttribute("temperature") ?? 0.8) };
    const all = "tokens next sampling attention lens pass";
    const usual = (stored.chat ? "chat " : "write ") + all;
    this.panels = (this.getAttribute("show") ?? usual).split(" ").map((name) => {
      const element = document.createElement("section");
      const find = (selector) => element.querySelector(selector);
      find.all = (selector) => [...element.querySelectorAll(selector)];
      element.innerHTML = PANELS[name].html(this);
      PANELS[name].start?.(this, find);
      live.append(element);
      return () => PANELS[name].update?.(this, find);
    });
    await this.begin(this.prompt);
    live.hidden = false;
    this.closest("[role=group]")?.setAttribute("aria-label", "A live language model");
    live.onpointerdown = live.onkeydown = ({ target }) => {
      if (!target.matches(".main")) this.playing = false; // that button says Stop
    };
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (this.hasAttribute("plays") && !still) this.play();
  }

  // Call `use` when a slider of a panel moves, and show what it returns beside them.
  controls(find, use) {
    const tell = () => use().forEach((words, i) => {
      find.all("output")[i].textContent = words;
      find.all("input")[i].setAttribute("aria-valuetext", words);
    });
    find.all("input").forEach((input) => {
      input.oninput = () => {
        tell();
        if (!this.writing) this.show();
      };
    });
    tell();
  }

  async begin(text) {
    let ids = this.emptyPrompt, news = "";
    try {
      if (text) ids = await this.ask("encode", text);
    } catch (error) {
      news = error.message;
    }
    await this.become(ids, news);
  }

  async become(ids, news = "") {
    this.stop();
    Object.assign(this, { ids, news, chosen: undefined });
    await this.show();
  }

  // Show the text: all panels draw the same one, whatever happens meanwhile.
  async show() {
    const number = ++this.shows, ids = this.ids;
    const { first, pieces } = await this.ask("read", ids);
    if (number !== this.shows) return; // a later one is on its way
    const last = ids.length - 1;
    const position = Math.max(Math.min(this.chosen ?? last, last), first);
    this.text = { ids, first, pieces, position, piece: pieces[position] };
    this.shadowRoot.querySelector(".live").classList.toggle("writing", this.writing);
    await Promise.all(this.panels.map((update) => update()));
  }

  select(position) {
    if (position < this.text.first) return; // the model no longer sees it
    Object.assign(this, { chosen: position, hovered: -1 });
    this.show();
  }

  async write(count, each) {
    const run = ++this.runs; // a stop, or another text, begins a new number
    let drawn = true, ended = false;
    this.writing = true;
    this.chosen = undefined;
    while (count > 0 && !ended) {
      if (drawn) { // one drawing at a time, then a tenth of a second for tokens alone
        drawn = false;
        this.show().then(() => setTimeout(() => { drawn = true; }, 100));
      }
      const id = await this.ask("draw", this.ids, this.settings);
      if (run !== this.runs) return;
      ended = id === null; // a special token ends a text
      if (!ended) this.ids = [...this.ids, id];
      await each?.();
      count -= 1;
    }
    this.writing = false;
    if (!this.playing) this.news = this.count() + (ended ? " The text ends here." : "");
    await this.show();
  }

  count() {
    const { ids, sizes: { context } } = this;
    const past = ids.length > context ? " The model no longer sees those struck out." : "";
    return `${ids.length} tokens.${past}`;
  }

  stop() {
    this.runs += 1;
    if (this.writing && !this.playing) this.news = this.count();
    this.writing = this.playing = false;
    if (this.text) this.show();
  }

  // Write by itself, slowly, until somebody touches the figure.
  async play() {
    this.playing = true;
    for (let n = 0; n < 30 && this.playing; n++) {
      await this.write(1);
      await new Promise((wake) => setTimeout(wake, 1200));
    }
    this.playing = false;
    await this.show();
  }

  // The ids of a conversation, and what is left out: the oldest turns, where it fills
  // the context.
  async conversation(system, turns, asked) {
    const first = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    const { context } = this.sizes;
    for (let news = ""; ; turns.splice(0, 2)) {
      const ids = await this.ask("render", [...first, ...turns, asked]);
      if (ids.length > context) news = "Too long: the model sees only the end.";
      if (ids.length < 0.8 * context || !turns.length) return [ids, news];
      news = "The model no longer sees the oldest turns.";
    }
  }
}

customElements.define("glass-gpt", GlassGPT);
