// The order of the search: chapters before appendices; a place in a page says where it is.
var Scorer = {
  score: (item) => {
    const [page, title, anchor, , score] = item;
    if (anchor && !title.includes(" &gt; ") && !title.includes(" > "))
      item[1] = `${title} › ${decodeURIComponent(anchor.slice(1)).replaceAll("-", " ")}`;
    return /\/(a\d|references|intro)/.test(page) ? score / 10 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
