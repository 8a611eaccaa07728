"use strict";
// Column names of longer tables become buttons that sort; without this script the tables are as they were written.
const value = (cell) => {
  const text = cell.textContent.trim();
  const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1);
for (const table of document.querySelectorAll("table[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const direction = header.ariaSort === "ascending" ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => direction * compare(value(a.cells[column]), value(b.cells[column])));
      table.tBodies[0].append(...rows);
      for (const other of header.parentNode.cells) other.ariaSort = "none";
      header.ariaSort = direction > 0 ? "ascending" : "descending";
    });
  });
}
