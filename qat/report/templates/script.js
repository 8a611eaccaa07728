"use strict";
// Column names of sortable tables become buttons; without this script the tables are as they were written.
(() => {
  const said = document.getElementById("said");
  const value = (cell) => {
    const text = cell ? cell.textContent.trim() : "";
    const number = Number(text.replace(/,/g, "").replace(/−/g, "-"));
    return text === "" || text === "–" ? null : Number.isNaN(number) ? text : number;
  };
  // Empty cells stay at the end, numbers come before words.
  const compare = (a, b, direction) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return direction * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  const sort = (table, column, header) => {
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row.cells[column]), row]);
    rows.sort((a, b) => compare(a[0], b[0], direction));
    body.append(...rows.map((pair) => pair[1]));
    for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
    const word = direction > 0 ? "ascending" : "descending";
    header.setAttribute("aria-sort", word);
    said.textContent = `Sorted by ${header.textContent.trim()}, ${word}`;
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, column, header));
    });
  }
  // What is cut off says so.
  const mark = () => {
    for (const one of document.querySelectorAll(".scroll")) one.classList.toggle("wide", one.scrollWidth > one.clientWidth + 1);
  };
  addEventListener("resize", mark);
  mark();
  // Paper cannot be opened.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((one) => !one.closest("#run-config"));
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => opened.forEach((one) => (one.open = false)));
})();
