"use strict";
// The atoms browser: all atoms in memory by columns, one page of them in the document, a card when one is chosen.
(() => {
  const PAGE = 25;
  const $ = (id) => document.getElementById(id);
  const list = $("list"), card = $("card"), search = $("search");
  const wide = matchMedia("(min-width: 62.01rem)");
  let data, columns, texts, order, first, open = null, sorted = { key: "heldout", down: true };

  const plain = (value) => value.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
  // Three digits everywhere, so that columns can be compared by eye.
  const number = (value) => (value === null ? "–" : Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : Math.abs(value) >= 1e3 ? value.toFixed(0) : value.toPrecision(3));
  const fixed = (value) => (value === null ? "–" : value.toFixed(3));
  const share = (count, of) => (count === 0 ? "0" : `${(100 * count / of).toFixed(2)}%`);
  const range = (i) => data.row.slice(data.at[i], data.at[i + 1]);
  const subjects = (i) => [...new Set(range(i).map((row) => data.rows.subject[row]).filter(Boolean))];
  const words = (i, side) => data.words[side].slice(8 * i, 8 * i + 8).map((at) => data.words.table[at]);
  const hasWords = () => typeof data.words !== "string";

  function load(id) {
    data = dataOf(id);
    texts = null;
    const nearest = data.train.map((_, i) => (data.neighbours ? data.coherence[data.neighbours * i] : null));
    columns = [
      { key: "index", label: "atom", value: (i) => i },
      { key: "heldout", label: "held-out", title: "share of held-out activations it fires on", value: (i) => data.heldout[i], show: (i) => share(data.heldout[i], data.n_heldout) },
      { key: "train", label: data.other, title: `share of its ${data.other} activations that it fires on`, value: (i) => data.train[i], show: (i) => share(data.train[i], data.n_train) },
      { key: "mean", label: "mean coef.", title: "mean coefficient where it fires", value: (i) => data.mean[i] },
      { key: "identity", label: "identity", title: "mean coherence with its partners in the other runs or dictionaries", value: (i) => data.identity[i], show: (i) => fixed(data.identity[i]) },
      { key: "margin", label: "margin", title: "how far its threshold is inside the identifiability window, in units of the threshold", value: (i) => data.margin[i] },
      { key: "near", label: "coherence", title: "largest coherence with another atom", value: (i) => nearest[i], show: (i) => fixed(nearest[i]) },
    ].filter(({ key }) => !["identity", "margin"].includes(key) || data[key]?.some((value) => value !== null));
    $("words-note").hidden = hasWords();
    if (!hasWords()) $("words-note").textContent = data.words;
    if (!columns.some((column) => column.key === sorted.key)) sorted = { key: "heldout", down: true };
    open = null;
    card.replaceChildren();
    heads();
    refresh();
    card.classList.remove("open");
    if (wide.matches && order.length) choose(order[0]);
  }

  function heads() {
    const row = make("tr");
    for (const column of columns) {
      const button = make("button", "", column.label);
      button.type = "button";
      if (column.title) button.title = column.title;
      button.addEventListener("click", () => {
        sorted = { key: column.key, down: sorted.key === column.key ? !sorted.down : column.key !== "index" };
        heads();
        refresh();
        list.tHead.querySelector("th[aria-sort] button").focus();
      });
      const head = make("th", column.key === "heldout" ? "held" : "", null, button);
      head.scope = "col";
      if (column.key === sorted.key) {
        head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
        button.textContent += sorted.down ? " ↓" : " ↑";
      }
      row.append(head);
    }
    const subject = make("th", "text", "top subjects");
    subject.scope = "col";
    row.cells[0].after(subject);
    const group = make("th", "", "fires on");
    group.scope = "colgroup";
    const groups = make("tr", "groups", null, make("td"), group, make("td"));
    [2, 2, columns.length - 3].forEach((span, at) => { groups.cells[at].colSpan = span; });
    list.tHead.replaceChildren(groups, row);
  }

  function haystack(i) {
    const found = range(i).flatMap((row) => [data.rows.subject[row], data.rows.answer[row] ?? ""]);
    return plain([...new Set(found), ...(hasWords() ? [...words(i, "up"), ...words(i, "down")] : [])].join("\n"));
  }
  // A number is an atom's; every other term has to be in its subjects, answers or words.
  function fits(i, terms) {
    return terms.every((term) => term === String(i) || texts[i].includes(term));
  }
  function refresh() {
    const terms = plain(search.value).split(/\s+/).filter(Boolean);
    if (terms.length && !texts) texts = data.train.map((_, i) => haystack(i));
    order = data.train.map((_, i) => i).filter((i) => !terms.length || fits(i, terms));
    const value = columns.find((column) => column.key === sorted.key).value;
    const keys = data.train.map((_, i) => value(i));
    order.sort((a, b) => {
      if (keys[a] === null || keys[b] === null) return (keys[a] === null) - (keys[b] === null) || a - b;
      return (sorted.down ? keys[b] - keys[a] : keys[a] - keys[b]) || a - b;
    });
    first = 0;
    rows();
  }

  function rows() {
    const shown = order.slice(first, first + PAGE);
    const made = shown.map((i) => {
      const button = make("button", "", String(i));
      button.type = "button";
      button.setAttribute("aria-label", `Atom ${i}`);
      const head = make("th", "", null, button);
      head.scope = "row";
      const cells = columns.slice(1).map((column) => make("td", column.key === "heldout" ? "held" : "", column.show ? column.show(i) : number(column.value(i))));
      const row = make("tr", "", null, head, make("td", "text", null, ...apart(subjects(i))), ...cells);
      row.dataset.atom = i;
      row.setAttribute("aria-current", String(i === open));
      row.addEventListener("click", () => choose(i, true));
      return row;
    });
    list.tBodies[0].replaceChildren(...made);
    const total = data.train.length;
    $("count").textContent = order.length === total ? `${total.toLocaleString("en")} atoms` : `${order.length.toLocaleString("en")} of ${total.toLocaleString("en")} atoms`;
    $("page").textContent = order.length ? `${(first + 1).toLocaleString("en")} to ${(first + shown.length).toLocaleString("en")} of ${order.length.toLocaleString("en")}` : "no atom fits";
    $("previous").disabled = first === 0;
    $("next").disabled = first + PAGE >= order.length;
  }

  // A text from right to left must not carry its neighbours along.
  function apart(items) {
    return items.flatMap((item, at) => [at ? ", " : "", make("bdi", "", item)]);
  }
  function context(i, at) {
    const row = data.row[at], text = data.rows, out = text.heldout[row];
    const line = make("p", "context", null, text.before[row], make("mark", "", text.token[row]), text.after[row]);
    line.dir = "auto";
    const fill = make("i");
    fill.style.width = `${100 * Math.abs(data.value[at]) / data.largest[i]}%`;
    const under = make("div", "under", null, make("span", out ? "badge out" : "badge", out ? "held-out" : data.other), make("span", "strength", null, fill), make("span", "", number(data.value[at])));
    if (text.answer[row] !== null) under.append(make("span", "answer", "answer: ", make("bdi", "", text.answer[row])));
    return make("li", "", null, line, under);
  }
  function histogram(i) {
    const bars = data.bars.slice(16 * i, 16 * i + 16), most = Math.max(...bars);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 160 56");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "Histogram of the atom's coefficients");
    bars.forEach((count, at) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = count ? Math.max(1, 56 * count / most) : 0;
      for (const [name, value] of Object.entries({ x: 10 * at + 0.5, y: 56 - height, width: 9, height })) bar.setAttribute(name, value);
      svg.append(bar);
    });
    return [svg, make("div", "axis", null, make("span", "", "0"), make("span", "", `${number(data.largest[i])}`))];
  }
  function list_of(className, items) {
    return make("ul", className, null, ...items);
  }

  function choose(i, asked = false) {
    open = i;
    const close = make("button", "close", "Close");
    close.type = "button";
    close.addEventListener("click", shut);
    const facts = make("dl", "facts", null, ...columns.slice(1).map((column) => make("div", "", null, make("dt", "", column.title?.startsWith("share") ? `fires ${column.label}` : column.label), make("dd", "", column.show ? column.show(i) : number(column.value(i))))));
    const parts = [make("header", "", null, make("h3", "", `Atom ${i}`), close), facts];
    if (data.at[i] === data.at[i + 1]) parts.push(make("p", "note", "It fires on none of these activations."));
    else {
      parts.push(make("h4", "", "Strongest contexts, the token read marked"), make("ol", "", null, ...range(i).map((_, at) => context(i, data.at[i] + at))));
      parts.push(make("h4", "", "Coefficients where it fires"), ...histogram(i));
    }
    if (hasWords()) {
      for (const [side, label] of [["up", "Logit lens, promotes"], ["down", "Logit lens, suppresses"]]) {
        parts.push(make("h4", "", label), list_of("words", words(i, side).map((word) => make("li", "", null, make("bdi", "", word.trim() || JSON.stringify(word))))));
      }
    }
    const near = Array.from({ length: data.neighbours }, (_, at) => data.neighbours * i + at);
    parts.push(make("h4", "", "Nearest atoms under the AIP, with their coherence"), list_of("near", near.map((at) => {
      const button = make("button", "", String(data.near[at]), make("small", "", fixed(data.coherence[at])));
      button.type = "button";
      button.setAttribute("aria-label", `Atom ${data.near[at]}, coherence ${fixed(data.coherence[at])}`);
      button.addEventListener("click", () => choose(data.near[at], true));
      return make("li", "", null, button);
    })));
    card.replaceChildren(...parts);
    card.scrollTop = 0;
    card.classList.toggle("open", asked);
    for (const row of list.tBodies[0].rows) row.setAttribute("aria-current", String(Number(row.dataset.atom) === i));
    if (asked && !wide.matches) card.focus({ preventScroll: true });
  }
  function shut() {
    card.classList.remove("open");
    list.querySelector(`tr[data-atom="${open}"] button`)?.focus({ preventScroll: true });
  }

  search.addEventListener("input", refresh);
  $("of").addEventListener("change", () => load($("of").value));
  $("previous").addEventListener("click", () => { first -= PAGE; rows(); });
  $("next").addEventListener("click", () => { first += PAGE; rows(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") shut();
    if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
    event.preventDefault();
    search.focus();
  });
  load($("of").value);
  root.dataset.ready = String(Math.round(performance.now()));
})();
