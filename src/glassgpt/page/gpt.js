// Written by tools/tangle.py from book/a4_publishing.ipynb: change it there.

function dot(x, y) {
  let even = 0, odd = 0, i = 0; // two sums: a processor works on both at once
  for (; i + 1 < y.length; i += 2) {
    even += x[i] * y[i];
    odd += x[i + 1] * y[i + 1];
  }
  return even + odd + (i < y.length ? x[i] * y[i] : 0);
}

const row = (matrix, i, width) => matrix.subarray(i * width, (i + 1) * width);
const add = (x, y) => x.map((number, i) => number + y[i]);

function linear({ weight, bias }, x) {
  const y = new Float32Array(weight.length / x.length);
  return y.map((_, i) => dot(row(weight, i, x.length), x) + (bias ? bias[i] : 0));
}

function softmax(scores, temperature = 1) {
  const highest = scores.reduce((a, b) => Math.max(a, b));
  const powers = scores.map((score) => Math.exp((score - highest) / temperature));
  const total = powers.reduce((sum, power) => sum + power);
  return powers.map((power) => power / total);
}

function attention(query, keys, values) {
  const root = Math.sqrt(query.length);
  const weights = softmax(keys.map((key) => dot(query, key) / root));
  const context = new Float32Array(query.length);
  values.forEach((value, position) => {
    for (let i = 0; i < value.length; i++) context[i] += weights[position] * value[i];
  });
  return { weights, context };
}

function multiHeadAttention({ qkv, projection }, x, heads) {
  const C = x.length, D = C / heads.length;
  const joined = linear(qkv, x); // 3 C numbers: queries, keys and values of all heads
  const contexts = new Float32Array(C);
  heads.forEach((head, h) => {
    const part = (n) => row(row(joined, n, C), h, D);
    const query = part(0);
    head.keys.push(part(1));
    head.values.push(part(2));
    const { weights, context } = attention(query, head.keys, head.values);
    head.weights.push(weights);
    contexts.set(context, h * D);
  });
  return linear(projection, contexts);
}

function layerNorm({ weight, bias }, x) {
  const mean = x.reduce((sum, number) => sum + number) / x.length;
  const centered = x.map((number) => number - mean);
  const deviation = Math.sqrt(dot(centered, centered) / x.length + 1e-5);
  return centered.map((number, i) => (number / deviation) * weight[i] + bias[i]);
}

const ROOT = Math.sqrt(2 / Math.PI);
const gelu = (a) => 0.5 * a * (1 + Math.tanh(ROOT * (a + 0.044715 * a ** 3)));

function mlp({ expand, projection }, x) {
  return linear(projection, linear(expand, x).map(gelu));
}

function block(part, x, cache) {
  const normed = layerNorm(part.attention_norm, x);
  x = add(x, multiHeadAttention(part.attention, normed, cache.heads));
  cache.afterAttention.push(x);
  x = add(x, mlp(part.mlp, layerNorm(part.mlp_norm, x)));
  cache.afterMlp.push(x);
  return x;
}

function gpt(model, id, cache) {
  const C = model.config.width, position = cache.start.length;
  const token = row(model.tokens.weight, id, C);
  let x = add(token, row(model.positions.weight, position, C));
  cache.start.push(x);
  model.blocks.forEach((part, layer) => {
    x = block(part, x, cache.layers[layer]);
  });
  return x;
}

const logits = (model, x) => linear(model.head, layerNorm(model.norm, x));

function newCache({ layers, heads }) {
  const many = (count, make) => Array.from({ length: count }, make);
  const head = () => ({ keys: [], values: [], weights: [] });
  const layer = () => ({ heads: many(heads, head), afterAttention: [], afterMlp: [] });
  return { start: [], layers: many(layers, layer) };
}

function numbers({ float32, int8, scales }) {
  const read = (text, Type) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Type(bytes.buffer);
  };
  if (float32) return read(float32, Float32Array);
  const whole = read(int8, Int8Array), scale = read(scales, Float32Array);
  const width = whole.length / scale.length;
  return Float32Array.from(whole, (number, i) => number * scale[Math.floor(i / width)]);
}

function openModel({ config, weights }) {
  const model = { config };
  for (const [name, stored] of Object.entries(weights)) {
    const path = name.split("."), last = path.pop();
    const part = path.reduce((parent, key) => (parent[key] ??= {}), model);
    part[last] = numbers(stored); // such as model.blocks[0].mlp.expand.weight
  }
  model.blocks = Object.values(model.blocks);
  model.head ??= model.tokens; // a tied head
  return model;
}

// GPT-2's words: the flag g finds all matches, u allows \p.
const SPACE = "\\p{White_Space}";
const OTHER = `[^${SPACE}\\p{L}\\p{N}]`;
const WORD = new RegExp(
  `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?${OTHER}+|` +
  `${SPACE}+(?!\\P{White_Space})|${SPACE}+`, "gu");

const utf8 = (text) => [...new TextEncoder().encode(text)];

function openTokenizer({ bytes, characters, merges, special }) {
  const symbols = bytes ?? characters; // what the first ids stand for
  const idOf = new Map(symbols.map((symbol, id) => [symbol, id]));
  const pieces = symbols.map((symbol) => (bytes ? [symbol] : utf8(symbol)));
  const becomes = new Map(); // keys like "5 7": two equal arrays are two keys
  for (const [left, right] of merges) {
    becomes.set(`${left} ${right}`, pieces.length);
    pieces.push([...pieces[left], ...pieces[right]]);
  }
  const specials = special.map((name) => pieces.push(utf8(name)) - 1); // length - 1
  return { bytes, idOf, becomes, pieces, specials };
}

function mergeWord(ids, becomes) {
  const born = (left, right) => becomes.get(`${left} ${right}`) ?? Infinity;
  while (true) {
    const pairs = ids.map((id, i) => born(ids[i - 1], id));
    const first = pairs.reduce((a, b) => Math.min(a, b), Infinity);
    if (first === Infinity) return ids;
    const merged = [];
    for (const id of ids) {
      const last = merged.length - 1;
      if (born(merged[last], id) === first) merged[last] = first;
      else merged.push(id);
    }
    ids = merged;
  }
}

function encode(text, { bytes, idOf, becomes }) {
  const words = bytes ? (text.match(WORD) ?? []).map(utf8) : [[...text]];
  const known = (symbol) => {
    if (idOf.has(symbol)) return idOf.get(symbol);
    throw new Error(`The model does not know the character “${symbol}”.`);
  };
  return words.flatMap((word) => mergeWord(word.map(known), becomes));
}

function decode(ids, { pieces }) {
  const bytes = Uint8Array.from(ids.flatMap((id) => pieces[id]));
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
}

function render(turns, { before, stop, after, usual }, tokenizer) {
  if (usual !== null && turns[0].role !== "system") {
    turns = [{ role: "system", content: usual }, ...turns];
  }
  const written = ({ role, content }) =>
    [...before[role], ...encode(content, tokenizer), ...stop, ...after];
  return [...turns.flatMap(written), ...before.assistant];
}

function candidates(scores, { temperature = 1, topK = Infinity, topP = 1 } = {}) {
  const p = softmax(Float64Array.from(scores), temperature);
  const order = [...p.keys()].sort((a, b) => p[b] - p[a]); // the likeliest first
  const lowest = p[order[Math.min(topK, order.length) - 1]];
  const likely = order.filter((id) => p[id] >= lowest); // ties with the k-th stay
  const sum = (ids) => ids.reduce((total, id) => total + p[id], 0);
  const share = topP * sum(likely);
  let before = 0; // what the likelier ones have
  const kept = likely.filter((id) => {
    const allowed = before < share || topP === 1; // then rounding forbids none
    before += p[id];
    return allowed;
  });
  const total = sum(kept);
  return kept.map((id) => ({ id, probability: p[id] / total }));
}

function sample(choices, random = Math.random) {
  let place = random();
  for (const { id, probability } of choices) {
    place -= probability;
    if (place < 0) return id;
  }
  return choices[0].id; // the probabilities summed to a little less than 1
}

function windowStart(length, context) {
  const half = Math.max(Math.floor(context / 2), 1);
  return Math.max(0, Math.ceil((length - context) / half)) * half;
}

function shorten({ start, layers }, length) {
  const lists = [start];
  for (const { heads, afterAttention, afterMlp } of layers) {
    lists.push(afterAttention, afterMlp);
    for (const { keys, values, weights } of heads) lists.push(keys, values, weights);
  }
  for (const list of lists) list.length = length;
}

function read(session, ids) {
  const { model, cache, window } = session;
  session.first = windowStart(ids.length, model.config.context);
  session.window = ids.slice(session.first);
  const differs = session.window.findIndex((id, i) => id !== window[i]);
  const kept = differs < 0 ? session.window.length : differs;
  shorten(cache, kept);
  for (const id of session.window.slice(kept)) gpt(model, id, cache);
}

onmessage = ({ data: [question, ...given] }) => {
  try {
    postMessage({ answer: answers[question](...given) });
  } catch (error) {
    postMessage({ error: error.message });
  }
};

// The stream after so many blocks, and the logits as if the model ended there.
function streamAt({ cache }, position, blocks) {
  return (blocks ? cache.layers[blocks - 1].afterMlp : cache.start)[position];
}

function passSteps({ model, cache, window }, position) {
  const C = model.config.width, minus = (x, y) => x.map((number, i) => number - y[i]);
  let x = cache.start[position];
  const steps = [
    ["the token's row of the table", row(model.tokens.weight, window[position], C)],
    ["the position's row of its table", row(model.positions.weight, position, C)],
    ["their sum enters the first block", x],
  ];
  cache.layers.forEach(({ afterAttention, afterMlp }, layer) => {
    const here = `block ${layer + 1}:`;
    const middle = afterAttention[position], end = afterMlp[position];
    steps.push(
      [`${here} what attention adds`, minus(middle, x)], [`${here} the sum`, middle],
      [`${here} what the MLP adds`, minus(end, middle)], [`${here} the sum`, end]);
    x = end;
  });
  steps.push(["the last norm: what the head reads", layerNorm(model.norm, x)]);
  return steps.map(([does, vector]) => ({ does, vector }));
}

const session = {}; // the model, its tokenizer, and what it has read

// A token as text; the bytes of one that is only part of a character.
function pieceOf(id) {
  const piece = decode([id], session.tokenizer);
  if (!piece.includes("\ufffd")) return piece;
  const hex = (byte) => byte.toString(16).padStart(2, "0");
  return `‹${session.tokenizer.pieces[id].map(hex).join(" ")}›`;
}

const named = ({ id, probability }) => ({ id, probability, piece: pieceOf(id) });

// Read a text; where in the window is one of its positions?
function look(ids, position) {
  read(session, ids);
  return position - session.first;
}

function guesses(place, blocks, settings) {
  const stream = streamAt(session, place, blocks);
  return candidates(logits(session.model, stream), settings);
}

const answers = {
  open(stored) {
    session.model = openModel(stored);
    session.tokenizer = openTokenizer(stored.tokenizer);
    session.chat = stored.chat;
    session.cache = newCache(stored.config);
    session.window = [];
  },
  encode: (text) => encode(text, session.tokenizer),
  decode: (ids) => decode(ids, session.tokenizer),
  render: (turns) => render(turns, session.chat, session.tokenizer),
  read(ids) {
    read(session, ids);
    return { first: session.first, pieces: ids.map(pieceOf) };
  },
  draw(ids, settings) {
    const place = look(ids, ids.length - 1), blocks = session.model.blocks.length;
    const id = sample(guesses(place, blocks, settings));
    return session.tokenizer.specials.includes(id) ? null : id;
  },
  next(ids, position, settings, count) {
    const place = look(ids, position), blocks = session.model.blocks.length;
    const choices = guesses(place, blocks, settings);
    return { kept: choices.length, choices: choices.slice(0, count).map(named) };
  },
  weights(ids, position, layer, head) {
    const place = look(ids, position);
    return session.cache.layers[layer].heads[head].weights[place];
  },
  lens(ids, position, count) {
    const place = look(ids, position), blocks = [0, ...session.model.blocks.keys()];
    return blocks.map((_, n) => guesses(place, n).slice(0, count).map(named));
  },
  pass: (ids, position) => passSteps(session, look(ids, position)),
};
