// Written by tools/tangle.py from book/19_publishing.ipynb: change it there.

// A thread of its own for the engine, so that the page never waits: ask(question, ...).
function startEngine(stored) {
  const source = new Blob([`(${engine})()`], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(source)), waiting = [];
  worker.onmessage = ({ data: { answer, error } }) => {
    const [resolve, reject] = waiting.shift(); // answers come in the order of questions
    error ? reject(new Error(error)) : resolve(answer);
  };
  const ask = (...question) => new Promise((...both) => {
    waiting.push(both);
    worker.postMessage(question);
  });
  ask("open", stored);
  return ask;
}

// What the reader sees, and hears, of a token.
const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => text.replace(/[&<>"]/g, (sign) => escapes[sign]);
const visible = (piece) => escaped(piece).replaceAll("\n", "↵");
const spoken = (piece) =>
  escaped(piece).replaceAll("\n", "new line").replace(/^ +$/, "space");
const percent = (share) => `${(100 * share).toFixed(1)}%`;

// A panel: its HTML, what connects its buttons, what draws it when the text changes.
const PANELS = {};

PANELS.next = {
  html: () => `<h3></h3><div class="guesses"></div><p></p>`,
  start(gpt, find) {
    find("div").onclick = (event) => event.target.value && gpt.become(
      [...gpt.ids.slice(0, gpt.position + 1), Number(event.target.value)]);
  },
  async update(gpt, find) {
    const { kept, choices } = await gpt.ask("next", gpt.column, gpt.settings, 10);
    find("h3").innerHTML = `The next token, after “${visible(gpt.piece)}”`;
    find("div").innerHTML = choices.map(({ id, piece, probability }) =>
      `<button value="${id}" aria-label="${spoken(piece)}, ${percent(probability)}"
        >${visible(piece)}</button>
      <i style="width:${(100 * probability) / choices[0].probability}%"></i>
      <b>${percent(probability)}</b>`).join("");
    find("p").textContent = `Tokens that can be drawn: ${kept}`;
  },
};

PANELS.tokens = {
  html: () => `<h3 id="tokens">Tokens</h3><div class="tokens" role="listbox"
    tabindex="0" aria-labelledby="tokens"></div><p role="status"></p>`,
  start(gpt, find) {
    const box = find(".tokens"), moves = { ArrowLeft: -1, ArrowRight: 1 };
    const place = ({ target }) => find.all("span").indexOf(target.closest("span"));
    box.onclick = (event) => gpt.select(place(event));
    box.onpointerover = (event) => gpt.hover(place(event));
    box.onpointerleave = () => gpt.hover(-1);
    box.onkeydown = (event) => {
      if (!(event.key in moves)) return;
      event.preventDefault();
      gpt.select(Math.max(gpt.position + moves[event.key], 0));
    };
  },
  update(gpt, find) {
    const box = find(".tokens");
    box.innerHTML = gpt.pieces.map((piece, i) =>
      `<span role="option" id="token${i}" aria-label="${spoken(piece)}"
        aria-selected="${i === gpt.position}" class="${i < gpt.first ? "past" : ""}"
        >${visible(piece)}</span>${"<br>".repeat(piece.split("\n").length - 1)}`
    ).join("");
    box.setAttribute("aria-activedescendant", `token${gpt.position}`);
    if (gpt.writing) box.scrollTop = box.scrollHeight;
    find("p").textContent = gpt.news;
  },
};

PANELS.write = {
  html: () => `<h3 id="prompt">Prompt</h3>
    <textarea rows="2" spellcheck="false" aria-labelledby="prompt"></textarea>
    <div class="buttons"><button class="main"></button>
    <button>One token</button><button>Start over</button></div>`,
  start(gpt, find) {
    const text = find("textarea"), [main, one, over] = find.all("button");
    text.value = gpt.prompt;
    text.oninput = over.onclick = () => gpt.begin(text.value);
    main.onclick = () => (gpt.writing || gpt.playing ? gpt.stop() : gpt.write(200));
    one.onclick = () => gpt.write(1);
  },
  update(gpt, find) {
    const [main, one, over] = find.all("button");
    main.textContent = gpt.writing || gpt.playing ? "Stop" : "Write";
    one.disabled = over.disabled = gpt.writing;
  },
};

function slider(name, max, value, { min = 1, step = 1 } = {}) {
  return `<label>${name} <input type="range" name="${name}" min="${min}" max="${max}"
    step="${step}" value="${value}" data-lm-suppress-shortcuts="true">
    <output></output></label>`;
}

PANELS.sampling = {
  html: ({ settings }) =>
    slider("temperature", 2, settings.temperature, { min: 0.1, step: 0.1 })
    + slider("top-k", 9, 9, { min: 0 })
    + slider("top-p", 1, 1, { min: 0.05, step: 0.05 }),
  start(gpt, find) {
    const [temperature, k, p] = find.all("input");
    const most = [1, 2, 3, 5, 10, 20, 50, 100, 200, Infinity];
    gpt.controls(find, () => {
      const topK = most[k.value];
      gpt.settings = { temperature: +temperature.value, topK, topP: +p.value };
      return [temperature.value, topK === Infinity ? "all" : topK, p.value];
    });
  },
};

PANELS.attention = {
  html: ({ sizes }) => `<h3>Attention</h3>${slider("layer", sizes.layers, 1)}
    ${slider("head", sizes.heads, 1)}<p aria-live="polite"></p>`,
  start(gpt, find) {
    gpt.controls(find, () => find.all("input").map((input) => input.value));
    gpt.hover = (place) => {
      gpt.hovered = place;
      this.update(gpt, find);
    };
  },
  async update(gpt, find) {
    const [layer, head] = find.all("input").map((input) => input.value - 1);
    const at = gpt.hovered < 0 ? gpt.position : gpt.hovered;
    if (at < gpt.first) return;
    const weights = [...await gpt.ask("weights", layer, head, at - gpt.first)];
    const most = weights.reduce((a, b) => Math.max(a, b)); // the darkest
    const box = gpt.shadowRoot.querySelector(".tokens");
    box.classList.add("shaded");
    box.querySelectorAll("span").forEach((token, i) => {
      token.style.setProperty("--weight", (weights[i - gpt.first] ?? 0) / most);
    });
    const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]);
    const told = order.slice(0, 3).map((i) =>
      `“${visible(gpt.pieces[gpt.first + i])}” ${percent(weights[i])}`);
    const from = visible(gpt.pieces[at]);
    find("p").innerHTML = `“${from}” looks at ${told.join(", ")}.`;
  },
};

PANELS.lens = {
  html: () => `<h3></h3><table></table>`,
  async update(gpt, find) {
    const cell = ({ piece, probability }) =>
      `<td><code>${visible(piece)}</code> ${percent(probability)}</td>`;
    const rows = (await gpt.ask("lens", gpt.column, 3)).map((guesses, layer) =>
      `<tr><th scope="row">${layer ? `block ${layer}` : "embedding"}</th>
        ${guesses.map(cell).join("")}</tr>`);
    find("h3").innerHTML = `The next token as each block sees it, after
      “${visible(gpt.piece)}”`;
    find("table").innerHTML = rows.join("");
  },
};

PANELS.pass = {
  html: ({ sizes }) => `<h3>One pass, step by step</h3>
    ${slider("step", 4 * sizes.layers + 4, 1)}<p aria-live="polite"></p>
    <div class="strip" aria-hidden="true"></div><p></p>`,
  start(gpt, find) {
    gpt.controls(find, () => [find("input").value]);
  },
  async update(gpt, find) {
    const steps = await gpt.ask("pass", gpt.column), [name, numbers] = find.all("p");
    const { does, vector } = steps[find("input").value - 1];
    const largest = vector.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
    name.textContent = does;
    const color = (x) => `background:${x < 0 ? "#d2142d" : "#2a66f0"};
      opacity:${Math.abs(x) / largest}`;
    find(".strip").innerHTML =
      [...vector].map((x) => `<i style="${color(x)}"></i>`).join("");
    const first = [...vector.slice(0, 6)].map((x) => x.toFixed(2)).join(", ");
    numbers.textContent = `${first}, ... (${vector.length} numbers)`;
  },
};

PANELS.chat = {
  html: () => `<label>System <input name="system"></label>
    <div role="log" aria-label="Conversation"></div>
    <form><input name="message" aria-label="Your message" autocomplete="off">
    <button class="main">Send</button></form>`,
  start(gpt, find) {
    const turns = [], log = find("[role=log]");
    const say = (role, words) => {
      log.insertAdjacentHTML("beforeend",
        `<p class="said"><b>${role}</b> <span></span></p>`);
      log.lastChild.lastChild.textContent = words;
      return log.lastChild.lastChild;
    };
    find("form").onsubmit = async (event) => {
      event.preventDefault();
      const message = find("[name=message]"), content = message.value.trim();
      if (gpt.writing || !content) return;
      message.value = "";
      turns.push({ role: "user", content });
      say("User", content);
      await gpt.become(await gpt.conversation(find("[name=system]").value, turns));
      const answer = say("Assistant", ""), before = gpt.ids.length;
      await gpt.write(gpt.sizes.context, async () => {
        answer.textContent = await gpt.ask("decode", gpt.ids.slice(before));
      });
      turns.push({ role: "assistant", content: answer.textContent });
    };
  },
};

const STYLE = `
:host{display:block;margin:1rem 0;font:1rem/1.45 system-ui,sans-serif}
.live{display:grid;gap:.9rem;max-width:42rem;margin:auto}
.live[hidden],.live:not([hidden])~slot{display:none}
@media print{.live{display:none!important}.live~slot{display:block!important}}
h3{margin:0 0 .3rem;font-size:1rem}
p{margin:.2rem 0}
textarea,input:not([type=range]){font:inherit;width:100%;box-sizing:border-box;
padding:.4rem .6rem;color:inherit;background:none;border:1px solid #8f8f8f;
border-radius:4px}
form,.buttons{display:flex;flex-wrap:wrap;gap:.5rem;margin-top:.4rem}
form input{flex:1}
button{font:inherit;min-height:2.5rem;padding:.2rem .9rem;cursor:pointer;color:inherit;
background:none;border:1px solid #8f8f8f;border-radius:4px}
button.main{background:#a6101f;border-color:#a6101f;color:#fff}
button:disabled{opacity:.5;cursor:default}
:focus-visible{outline:3px solid #2a66f0;outline-offset:2px}
.tokens{font:.95rem/2 ui-monospace,Menlo,Consolas,monospace;max-height:14rem;
overflow:auto;padding:.3rem}
.tokens span{white-space:pre-wrap;padding:.2em .1em;margin:0 1px;border-radius:3px;
cursor:pointer;background:#e83e8c26;box-decoration-break:clone}
.tokens span:nth-child(even){background:#e83e8c52}
.tokens.shaded span{background:rgb(160 80 180/calc(.6*var(--weight,0)))}
.tokens span[aria-selected=true]{outline:2px solid #d2142d}
.tokens span.past{text-decoration:line-through}
.guesses{display:grid;grid-template-columns:minmax(4em,max-content) 1fr 4.2em;
gap:2px .5rem;align-items:center}
.guesses button{min-height:1.75rem;padding:0 .4rem;text-align:right;white-space:pre;
font:.95rem ui-monospace,Menlo,Consolas,monospace}
.guesses i{background:#8f8f8f;height:.9em;min-width:1px;border-radius:2px}
label{display:grid;grid-template-columns:7em 1fr 3.5em;gap:.5rem;align-items:center}
label input{width:100%;height:2rem;margin:0;cursor:pointer}
output,td,.guesses b{font-weight:400;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;font-weight:400;padding:.15rem .5rem .15rem 0}
code{font:.95rem ui-monospace,Menlo,Consolas,monospace;white-space:pre}
.strip{display:flex;height:1.6rem;border:1px solid #8f8f8f}
.strip i{flex:1}
.said{white-space:pre-wrap}
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
    script.onerror = reject;
    document.head.append(script);
  });
  return loading;
}

class GlassGPT extends HTMLElement {
  ids = [];
  hovered = -1;
  shows = 0;
  hover = () => {};

  connectedCallback() {
    if (this.shadowRoot) return;
    this.attachShadow({ mode: "open" }).innerHTML =
      `<style>${STYLE}</style><div class="live" hidden></div><slot></slot>`;
    const watcher = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) return;
      watcher.disconnect();
      this.start();
    }, { rootMargin: "200px" });
    watcher.observe(this);
  }

  async start() {
    const stored = await loadModel(), live = this.shadowRoot.querySelector(".live");
    this.ask = startEngine(stored);
    this.sizes = stored.config;
    this.nothing = stored.tokenizer.start; // what an empty prompt stands for
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
    live.onpointerdown = live.onkeydown = ({ target }) => {
      if (!target.matches(".main")) this.playing = false; // that button says Stop
    };
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (this.hasAttribute("plays") && !still) this.play();
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

  // Call `use` when a slider of a panel moves, and show what it returns beside them.
  controls(find, use) {
    const tell = () => use().forEach((words, i) => {
      find.all("output")[i].textContent = words;
      find.all("input")[i].setAttribute("aria-valuetext", words);
    });
    find.all("input").forEach((input) => {
      input.oninput = () => { tell(); this.show(); };
    });
    tell();
  }

  // Where we look: a place in the text, and in what the model still sees.
  get position() { return Math.min(this.chosen ?? Infinity, this.ids.length - 1); }
  get column() { return Math.max(this.position - this.first, 0); }
  get piece() { return this.pieces[this.position]; }

  async begin(text) {
    this.stop();
    try {
      await this.become(text ? await this.ask("encode", text) : this.nothing);
    } catch (error) {
      this.news = error.message;
      await this.show();
    }
  }

  async become(ids) {
    this.ids = ids;
    this.chosen = undefined;
    this.news = "";
    await this.show();
  }

  async show() {
    const number = ++this.shows;
    Object.assign(this, await this.ask("read", this.ids));
    for (const update of this.panels) if (number === this.shows) await update();
  }

  select(position) {
    if (position < 0) return;
    this.chosen = position;
    this.show();
  }

  async write(count, each) {
    this.writing = true;
    this.chosen = undefined;
    let ended = false; // a special token ends a text
    while (count > 0 && this.writing) {
      const end = performance.now() + 12; // some tokens, then the page is drawn
      while (count-- > 0 && this.writing && performance.now() < end) {
        const id = await this.ask("draw", this.settings);
        if ((ended = id === null)) this.stop();
        else await this.ask("read", this.ids = [...this.ids, id]);
      }
      await this.show();
      await each?.();
      await new Promise(requestAnimationFrame);
    }
    this.writing = false;
    const past = this.first ? " The model no longer sees those struck through." : "";
    this.news = `${this.ids.length} tokens.${ended ? " The text ends here." : past}`;
    await this.show();
  }

  stop() { this.writing = this.playing = false; }

  // The ids of a conversation; the oldest turns go when it fills the context.
  async conversation(system, turns) {
    const first = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    for (;;) {
      const ids = await this.ask("render", [...first, ...turns]);
      if (ids.length < 0.8 * this.sizes.context || turns.length < 3) return ids;
      turns.splice(0, 2);
    }
  }
}

customElements.define("glass-gpt", GlassGPT);
