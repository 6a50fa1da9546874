"use strict";
// Parts of the page. Text from the data reaches the document as textContent or as an
// attribute only.
const $ = (id) => document.getElementById(id);
const COLOURS = 8;
const DASHES = ["none", "7 3", "2 3", "9 3 2 3"];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

const number = (value, digits = 4) => (value == null ? "–" : value.toFixed(digits));

function short(value) {
  if (value == null) return "–";
  const text = Math.abs(value).toFixed(2);
  const bare = text === "0.00" ? "0" : text.replace(/^0/, "");
  return value < 0 && bare !== "0" ? `−${bare}` : bare;
}

function options(select, names, groups = null) {
  names.forEach((name, index) => {
    const option = make("option", { value: index }, name);
    if (!groups) return select.append(option);
    const label = `layer ${groups[index]}`;
    let group = select.lastElementChild;
    if (!group || group.label !== label) select.append((group = make("optgroup", { label })));
    group.append(option);
  });
}

// One tab stop for many buttons in rows; arrow keys move among them.
function arrows(box, rows) {
  const list = rows.flat();
  const moveTo = (button) => {
    list.forEach((other) => (other.tabIndex = other === button ? 0 : -1));
    button.focus();
  };
  list.forEach((button, index) => (button.tabIndex = index ? -1 : 0));
  box.onkeydown = (event) => {
    const row = rows.findIndex((buttons) => buttons.includes(event.target));
    if (row < 0) return;
    const column = rows[row].indexOf(event.target);
    const place = list.indexOf(event.target);
    const below = (step) => (rows[row + step] || [])[column];
    const next = {
      ArrowRight: list[place + 1],
      ArrowLeft: list[place - 1],
      ArrowDown: rows.length > 1 ? below(1) : list[place + 1],
      ArrowUp: rows.length > 1 ? below(-1) : list[place - 1],
      Home: rows[row][0],
      End: rows[row][rows[row].length - 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    moveTo(next);
  };
}

function tint(button, part, opposite = false) {
  button.style.setProperty("--v", part);
  button.classList.toggle("opposite", opposite);
  // text that can be read on the tint, on light and on dark pages
  button.classList.toggle("dark", part > 0.73);
  button.classList.toggle("light", part > 0.59);
}

function expertHeads(count) {
  const heads = Array.from({ length: count }, (_, e) => make("th", { scope: "col" }, `e${e}`));
  return make("thead", {}, make("tr", {}, make("td"), ...heads));
}

function expertList(list, values, top = 1) {
  list.replaceChildren(
    ...values.map((value, expert) => {
      const bar = make("i");
      bar.style.width = `${(100 * (value || 0)) / Math.max(top, 1e-9)}%`;
      return make(
        "li",
        { class: `c${expert % COLOURS}` },
        make("span", { class: "name" }, `e${expert}`),
        make("span", { class: "bar" }, bar),
        make("span", { class: "number" }, number(value)),
      );
    }),
  );
}
