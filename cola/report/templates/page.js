"use strict";
// Tables that sort by a click or a key on a column's head: once up, once down, once as they came. What a cell is sorted
// by is its data-sort, a number, else its text; a cell with nothing to say (–) comes last either way.
const status = document.getElementById("sorted");
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const asTheyCame = [...body.rows];
  if (asTheyCame.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = { ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")] || "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      if (order !== "none") head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const rows = order === "none" ? asTheyCame : [...asTheyCame].sort((a, b) => compare(a.cells[column], b.cells[column], sign));
      body.append(...rows);
      status.textContent = order === "none" ? "in the order of the recipe" : `sorted by ${button.textContent}, ${order}`;
    });
  });
}

function compare(a, b, sign) {
  const [first, second] = [a, b].map((cell) => {
    const text = cell.textContent.trim();
    const number = cell.dataset.sort === undefined ? NaN : Number(cell.dataset.sort);
    return { text, number, rank: !Number.isNaN(number) ? 0 : text === "–" || text === "" ? 2 : 1 };
  });
  if (first.rank !== second.rank) return first.rank - second.rank;
  if (first.rank === 0) return sign * (first.number - second.number);
  return first.rank === 2 ? 0 : sign * first.text.localeCompare(second.text, "en", { numeric: true });
}

// What is folded is printed too, but for long tables, and folded again afterwards.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open], .long)")];
  for (const fold of folded) fold.open = true;
});
addEventListener("afterprint", () => {
  for (const fold of folded) fold.open = false;
});

// The numbers of a figure's points: at the pointer, and by the arrow keys where a figure has the focus. A point has them
// in its title, which a browser shows without this script, if late and without keys.
const tip = document.getElementById("tip");
let told = null;
function tell(point) {
  told?.classList.remove("at");
  told = point;
  tip.hidden = !point;
  if (!point) return;
  point.classList.add("at");
  tip.textContent = point.dataset.says;
  const box = point.getBoundingClientRect();
  const left = Math.max(0, Math.min(box.right + 4, document.documentElement.clientWidth - tip.offsetWidth));
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${Math.max(0, box.top - tip.offsetHeight - 4) + scrollY}px`;
}
for (const figure of document.querySelectorAll("figure")) {
  const points = [...figure.querySelectorAll(".points circle")];
  for (const point of points) {
    point.dataset.says = point.textContent;
    point.replaceChildren();
  }
  figure.addEventListener("pointerover", (event) => tell(event.target.closest(".points circle")));
  figure.addEventListener("pointerleave", () => tell(null));
  figure.addEventListener("focusout", () => tell(null));
  figure.querySelector(".wide").addEventListener("keydown", (event) => {
    if (event.key === "Escape") tell(null);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const shown = step ? points.filter((point) => getComputedStyle(point).visibility === "visible") : [];
    if (!shown.length) return;
    event.preventDefault();
    const at = shown.indexOf(told);
    const next = shown[at < 0 ? (step > 0 ? 0 : shown.length - 1) : (at + step + shown.length) % shown.length];
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
    tell(next);
  });
}
