"use strict";
// Sorting, searching, filtering, paging and a choice of columns for each table; without scripts all rows and columns show.
(() => {
  const MOST_CHOICES = 24, ROWS = 15, FEW = 6, MOST_PRINTED = 200;
  const parts = (text) => text.split(/;\s*/);
  const made = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  function enhance(table) {
    const heads = [...table.tHead.rows[0].cells];
    const names = heads.map((head) => head.textContent.trim());
    const texts = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
    const title = table.caption.textContent.trim();
    const hidden = heads.filter((head) => head.dataset.visible === "false");
    const wanted = new Map();
    const tools = made("div", { className: "tools" });

    heads.forEach((head, column) => {
      if (head.dataset.type === "num" || hidden.includes(head)) return;
      const choices = [...new Set(texts.flatMap((row) => parts(row[column])))].sort();
      if (choices.length < 2 || choices.length > MOST_CHOICES || choices.length > texts.length / 2) return;
      const select = made("select", { ariaLabel: names[column] }, made("option", { value: "*", textContent: "all" }));
      for (const choice of choices) select.append(made("option", { value: choice, textContent: choice || "(none)" }));
      select.addEventListener("change", () => {
        if (select.value === "*") wanted.delete(column);
        else wanted.set(column, select.value);
        shown.draw();
      });
      tools.append(made("label", {}, names[column], select));
    });

    const paged = texts.length > ROWS + 5;
    // It reads data-type and data-visible of the header cells, and data-order of the others.
    const shown = new DataTable(table, {
      autoWidth: false,
      order: [],
      orderMulti: true,
      paging: paged,
      pageLength: ROWS,
      lengthMenu: [ROWS, 50, 200, -1],
      layout: {
        topStart: () => tools,
        topEnd: texts.length > FEW ? "search" : null,
        bottomStart: paged ? ["info", "pageLength"] : texts.length > FEW ? "info" : null,
        bottomEnd: paged ? "paging" : null,
      },
      language: {
        search: "Search",
        info: "rows _START_ to _END_ of _TOTAL_",
        infoEmpty: "no rows",
        infoFiltered: "(out of _MAX_)",
        lengthMenu: "_MENU_ a page",
        lengthLabels: { "-1": "all" },
        zeroRecords: "No row matches.",
        entries: { _: "rows", 1: "row" },
      },
    });
    shown.search.fixed("filters", (text, data, row) =>
      [...wanted].every(([column, value]) => parts(texts[row][column]).includes(value)));

    if (hidden.length) {
      const choices = made("div", { className: "choices" });
      names.forEach((name, column) => {
        const box = made("input", { type: "checkbox", checked: shown.column(column).visible() });
        box.addEventListener("change", () => shown.column(column).visible(box.checked));
        choices.append(made("label", {}, box, name));
      });
      tools.append(made("details", {}, made("summary", { textContent: `Columns (${hidden.length} more)` }), choices));
    }
    const box = table.closest(".dt-layout-table");
    Object.assign(box, { tabIndex: 0 });
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `${title}, scrolls sideways`);

    let length;
    addEventListener("beforeprint", () => {
      length = shown.page.len();
      if (paged && shown.rows({ search: "applied" }).count() <= MOST_PRINTED) shown.page.len(-1).draw();
    });
    addEventListener("afterprint", () => shown.page.len(length).draw(false));
  }

  document.querySelectorAll("table.data").forEach(enhance);

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details.legend:not([open])")];
    closed.forEach((details) => (details.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((details) => (details.open = false)));
})();
