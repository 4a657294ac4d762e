// On paper the page is light, and its hints are open.
addEventListener("beforeprint", () => {
  const root = document.documentElement;
  const theme = root.dataset.theme;
  const hints = [...document.querySelectorAll("article details:not(.hide, [open])")];
  root.dataset.theme = "light";
  hints.forEach((hint) => (hint.open = true));
  const back = () => {
    root.dataset.theme = theme;
    hints.forEach((hint) => (hint.open = false));
  };
  addEventListener("afterprint", back, { once: true });
});

// Boxes that scroll can be focused. To ask one lays out its cell, so they are asked in turn,
// a few milliseconds at a time.
// A cell that is laid out need not wait any more, and so enters the accessibility tree, where
// the browser keeps the text in view while what is above it takes its true height.
const anchored = CSS.supports("overflow-anchor", "auto");
const boxes = "pre, .cell_output > .output, .pst-scrollable-table-container";
let waiting = [];
const ask = () => {
  const end = performance.now() + 5;
  while (waiting.length && performance.now() < end) {
    const box = waiting.shift();
    const { scrollWidth, clientWidth, scrollHeight, clientHeight } = box;
    box.tabIndex = scrollWidth > clientWidth || scrollHeight > clientHeight ? 0 : -1;
    const cell = anchored && box.closest("div.cell");
    if (cell) cell.style.contentVisibility = "visible";
  }
  if (waiting.length) setTimeout(ask);
};
const askAll = () => {
  waiting = [...document.querySelectorAll(boxes)];
  ask();
};
addEventListener("load", askAll);
// A slider and a fold show boxes that were hidden when they were asked.
let pause;
const askSoon = () => {
  clearTimeout(pause);
  pause = setTimeout(askAll, 300);
};
for (const change of ["resize", "input", "toggle"]) addEventListener(change, askSoon, true);

// "On this page" as a drawer closes when it has led somewhere.
addEventListener("click", ({ target }) => {
  if (target.closest("a")?.hash) target.closest("dialog")?.close();
});

// A page with folded code of the package has a button that opens all of it.
const program = [...document.querySelectorAll("div.cell.tag_export details.hide")];
if (program.length) {
  const button = document.createElement("button");
  const say = (open) => (button.textContent = open ? "Fold the code again" : "Open all code");
  button.className = "glass-open-all";
  button.type = "button";
  button.onclick = () => {
    const open = program.some((fold) => !fold.open);
    program.forEach((fold) => (fold.open = open));
    say(open);
  };
  say(false);
  document.querySelector("article h1").after(button);
}
