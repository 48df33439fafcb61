"use strict";
// Tables are sorted by their headers; tables of rows are searched and filtered by what they hold. All in this file.

const number = (text) => {
  const value = parseFloat(text.replace(/[,\s%]/g, ""));
  return Number.isNaN(value) ? null : value;
};

function compare(one, other) {
  const a = number(one), b = number(other);
  if (a !== null && b !== null) return a - b;
  if (a !== null || b !== null) return a !== null ? -1 : 1; // numbers before what is not known
  return one.localeCompare(other);
}

function makeSortable(table) {
  const headers = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.querySelector(".between") || body.rows.length < 2) return;
  const original = [...body.rows];
  headers.forEach((header, column) => {
    if (header.classList.contains("texts")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.title = "Sort by this column";
    header.append(button);
    button.addEventListener("click", () => {
      const next = { none: "descending", descending: "ascending", ascending: "none" };
      const order = next[header.ariaSort || "none"];
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.ariaSort = order;
      const lines = [...original];
      const text = (line) => line.cells[column].innerText.trim();
      if (order !== "none") lines.sort((a, b) => compare(text(a), text(b)));
      if (order === "descending") lines.reverse();
      body.append(...lines);
    });
  });
}

function makeSearchable(section) {
  const parts = [...section.querySelectorAll(".rows-part")];
  const bar = section.querySelector(".search");
  if (!bar || !parts.some((part) => part.querySelector("tbody"))) return;
  const words = bar.querySelector("input"), kind = bar.querySelector("select"), said = bar.querySelector("output");
  for (const part of parts) kind.add(new Option(part.querySelector("h3").innerText));
  const update = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, all = 0;
    parts.forEach((part, i) => {
      const chosen = kind.selectedIndex <= 0 || kind.selectedIndex === i + 1;
      let found = 0;
      for (const row of part.querySelectorAll("tbody tr")) {
        const text = row.textContent.toLowerCase();
        const hit = wanted.every((word) => text.includes(word));
        row.hidden = !hit;
        found += hit;
        all += 1;
      }
      shown += chosen ? found : 0;
      part.hidden = !chosen || (wanted.length > 0 && !found);
    });
    said.textContent = `${shown} of ${all} listed ${all === 1 ? "row" : "rows"}`;
  };
  words.addEventListener("input", update);
  kind.addEventListener("change", update);
  update();
  bar.hidden = false;
}

document.querySelectorAll("table").forEach(makeSortable);
document.querySelectorAll(".rows-section").forEach(makeSearchable);
