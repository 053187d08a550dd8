// Sorts tables by a click on a header, on a telephone by a list above the cards; opens everything for print.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], first = [...body.rows];
  if (first.length < 2) continue;
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const list = document.createElement("select");
  list.append(new Option("as written", ""));
  const sort = (index, down) => {
    const value = (row) => row.cells[index].dataset.sort, sign = down ? -1 : 1;
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // unknown values last, whichever way
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    body.append(...(index < 0 ? first : [...first].sort(compare)));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== index ? "none" : down ? "descending" : "ascending"));
    list.value = index < 0 ? "" : `${index} ${down}`;
  };
  heads.forEach((head, index) => {
    const button = document.createElement("button"), name = head.textContent;
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(index, head.getAttribute("aria-sort") === "ascending"));
    list.append(new Option(`${name}, ascending`, `${index} false`), new Option(`${name}, descending`, `${index} true`));
  });
  list.addEventListener("change", () => {
    const [index, down] = list.value.split(" ");
    sort(list.value ? Number(index) : -1, down === "true");
  });
  const label = document.createElement("label");
  label.className = "sort";
  label.append("Sort by ", list);
  table.parentElement.before(label);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
