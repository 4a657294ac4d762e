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

// Boxes that scroll can be focused. To ask one lays out its cell, so they are asked in turn.
const boxes = "pre, .cell_output > .output, .pst-scrollable-table-container";
const waiting = [...document.querySelectorAll(boxes)];
const ask = () => {
  const box = waiting.shift();
  if (!box) return;
  const { scrollWidth, clientWidth, scrollHeight, clientHeight } = box;
  box.tabIndex = scrollWidth > clientWidth || scrollHeight > clientHeight ? 0 : -1;
  setTimeout(ask);
};
addEventListener("load", ask);

// "On this page" as a drawer closes when it has led somewhere.
addEventListener("click", ({ target }) => {
  if (target.closest("a")?.hash) target.closest("dialog")?.close();
});
