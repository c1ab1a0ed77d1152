"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);

function element(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;  // never as HTML: models wrote it
  if (className) node.className = className;
  return node;
}

/* Charts */

function tabulate(rows) {
  const box = element("div", undefined, "wide"), table = element("table"), head = element("thead"), body = element("tbody");
  const columns = [...new Set(rows.flatMap(row => Object.keys(row)))];
  const add = (parent, cells, name) => {
    const line = element("tr");
    line.append(...cells.map(cell => element(name, cell ?? "–")));
    parent.append(line);
  };
  add(head, columns, "th");
  for (const row of rows) add(body, columns.map(column => row[column]), "td");
  table.append(head, body);
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Data of the chart");
  box.append(table);
  return box;
}

for (const place of document.querySelectorAll("[data-chart]")) {
  const chart = data.charts[place.dataset.chart], numbers = place.parentElement.querySelector(".numbers");
  const options = {config: data.config, renderer: "svg", actions: false, defaultStyle: false, tooltip: {disableDefaultStyle: true}};
  // The place has a name; the image's parts need none.
  vegaEmbed(place, chart, options).then(() => place.querySelector("svg").setAttribute("aria-hidden", "true"), console.error);
  numbers.addEventListener("toggle", () => numbers.append(tabulate(chart.data.values)), {once: true});
}

/* Answers */

const REFERENCE = "reference output", STEP = 20;
const {models, rows} = data.answers;
const controls = {};
for (const id of ["model", "opponent", "outcome", "set", "order", "search"]) controls[id] = find(id);
let matches = [], shown = 0;

const preference = (row, model) => model === REFERENCE ? 1.5 : row.preferences[models.indexOf(model)];
const answer = (row, model) => model === REFERENCE ? row.reference : row.answers[models.indexOf(model)];
const percent = value => value === null ? "no preference" : `${(100 * (value - 1)).toFixed(2)}%`;

/** The judge's preference for the answer of `model` minus that for the one of `opponent`, or null. */
function change(row) {
  const [first, second] = [controls.model, controls.opponent].map(control => preference(row, control.value));
  return first === null || second === null ? null : first - second;
}

function outcome(row) {
  const difference = change(row);
  return difference === null ? "none" : difference > 0 ? "win" : difference < 0 ? "loss" : "tie";
}

/** Split two texts into words and spaces, and say for each word whether a longest common subsequence has it. */
function compareWords(first, second) {
  const [a, b] = [first, second].map(text => text.split(/(\s+)/).filter(Boolean));
  const isWord = text => /\S/.test(text), x = a.filter(isWord), y = b.filter(isWord);
  if (x.length * y.length > 4e6) return [a, b].map(parts => parts.map(text => [text, true]));
  const lengths = Array.from({length: x.length + 1}, () => new Uint16Array(y.length + 1));
  for (let i = x.length - 1; i >= 0; i--)
    for (let j = y.length - 1; j >= 0; j--)
      lengths[i][j] = x[i] === y[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const common = [new Set(), new Set()];
  for (let i = 0, j = 0; i < x.length && j < y.length;) {
    if (x[i] === y[j]) { common[0].add(i++); common[1].add(j++); }
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return [a, b].map((parts, side) => {
    let index = 0;
    return parts.map(text => [text, !isWord(text) || common[side].has(index++)]);
  });
}

function mark(parts, className) {
  const node = element("dd");
  node.append(...parts.map(([text, same]) => same ? text : element("mark", text, className)));
  return node;
}

function describe(row) {
  const article = element("article"), list = element("dl"), others = element("details"), rest = element("dl");
  const names = [controls.model.value, controls.opponent.value];
  const compared = compareWords(...names.map(name => answer(row, name)));
  const label = name => name === REFERENCE ? name : `${name}, ${percent(preference(row, name))}`;
  names.forEach((name, side) => list.append(element("dt", label(name)), mark(compared[side], ["first", "second"][side])));
  for (const name of [REFERENCE, ...models].filter(name => !names.includes(name)))
    rest.append(element("dt", label(name)), element("dd", answer(row, name)));
  others.append(element("summary", "Other answers"), rest);
  const difference = change(row), points = difference === null ? "no preference" : `${(100 * difference).toFixed(2)} points`;
  const title = `${{win: "win", loss: "loss", tie: "tie", none: "not judged"}[outcome(row)]}, ${difference > 0 ? "+" : ""}${points}`;
  const note = element("p", [title, row.data_set].filter(Boolean).join(" · "), "note");
  article.append(element("h3", row.instruction), note, list);
  if (rest.childElementCount) article.append(others);
  return article;
}

function show() {
  find("list").append(...matches.slice(shown, shown + STEP).map(describe));
  shown = Math.min(matches.length, shown + STEP);
  find("count").textContent = `Showing ${shown} of ${matches.length} matches among ${rows.length} instructions`;
  find("more").hidden = shown === matches.length;
}

function select() {
  const query = controls.search.value.toLowerCase();
  matches = rows.filter(row =>
    [row.instruction, row.reference, ...row.answers].some(text => text.toLowerCase().includes(query))
    && ["all", outcome(row)].includes(controls.outcome.value)
    && ["", row.data_set].includes(controls.set.value));
  const sign = {gain: -1, drop: 1}[controls.order.value];
  if (sign) {
    const key = row => change(row) === null ? Infinity : sign * change(row);  // without a preference: last
    matches.sort((a, b) => key(a) === key(b) ? 0 : key(a) - key(b));
  }
  shown = 0;
  find("list").replaceChildren();
  show();
}

const options = names => names.map(name => new Option(name, name));
const sets = [...new Set(rows.map(row => row.data_set))];
controls.model.append(...options(models));
controls.opponent.append(...options([REFERENCE, ...models]));
controls.model.value = models.at(-1);
controls.opponent.value = models.length > 1 ? models[0] : REFERENCE;
controls.set.append(...options(sets.filter(Boolean)));
find("sets").hidden = sets.length < 2;
for (const control of Object.values(controls)) control.addEventListener("input", select);
find("controls").addEventListener("submit", event => event.preventDefault());
find("more").addEventListener("click", show);
select();
