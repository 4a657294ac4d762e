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

// Boxes that scroll can be focused. To ask whether one does lays its section out, so it is
// asked when the section comes near.
const boxes = "pre, .cell_output > .output, .pst-scrollable-table-container";
const letFocus = (part) =>
  part.querySelectorAll(boxes).forEach((box) => {
    const { scrollWidth, clientWidth, scrollHeight, clientHeight } = box;
    box.tabIndex = scrollWidth > clientWidth || scrollHeight > clientHeight ? 0 : -1;
  });
const near = (part) => part.getBoundingClientRect().top < 2 * innerHeight;
[...document.querySelectorAll("article > section > *")].filter(near).forEach(letFocus);
const shown = (event) => event.skipped || letFocus(event.target);
document.addEventListener("contentvisibilityautostatechange", shown, true);
