// What the page shows; page_data in __init__.py tells what is in data.
const data = JSON.parse(document.getElementById("data").textContent);
const NAMES = { share: "share", gate: "mean gate", mean_weight: "share of the gates" };
const MEAN = "mean of the layer";
// index of the site, text, token and log step that are shown
const shown = { site: 0, text: 0, token: 0, step: 0 };

// Use of the experts ---------------------------------------------------------------

// What a row of the heat map shows: the mean of a layer, or one of its sites.
function useRows() {
  const module = $("module").selectedOptions[0].textContent;
  if ($("module").selectedIndex === 0) {
    return data.layers.map((layer, index) => ({ layer, index, kind: "layers", site: null }));
  }
  return data.places
    .map((place, index) => ({ layer: data.layers[place.layer], index, kind: "sites", site: index }))
    .filter((row) => data.places[row.index].module === module);
}

function drawHeat() {
  const measure = $("measure").value;
  const rows = useRows();
  const every = data.tasks.flatMap((task) => rows.map((row) => task[row.kind][row.index]));
  const top = Math.max(1e-9, ...every.flatMap((use) => (use ? use[measure] : [])));
  const experts = Math.max(...every.map((use) => (use ? use[measure].length : 0)));
  const task = data.tasks[$("task").value];
  const body = make("tbody");
  const buttons = [];
  for (const row of rows) {
    const use = task[row.kind][row.index];
    const line = make("tr", {}, make("th", { scope: "row", title: row.layer }, row.layer));
    const cells = (use ? use[measure] : []).map((value, expert) => {
      const label = `layer ${row.layer}, expert ${expert}, ${NAMES[measure]} ${number(value)}`;
      const button = make("button", { type: "button", "aria-label": label }, short(value));
      if (value != null) tint(button, value / top);
      button.onmouseenter = button.onfocus = () => readUse(row, expert, use);
      button.onclick = () => {
        readUse(row, expert, use);
        if (row.site != null) showSite(row.site);
      };
      if (row.site === shown.site) button.classList.add("chosen");
      return button;
    });
    line.append(...cells.map((button) => make("td", {}, button)));
    if (cells.length) buttons.push(cells);
    else line.append(make("td", { colspan: experts }, "no tokens of this task"));
    body.append(line);
  }
  $("heat").style.setProperty("--experts", experts);
  $("heat").replaceChildren(expertHeads(experts), body);
  $("heat").setAttribute("aria-label", `${NAMES[measure]}, ${task.name}: layers by experts`);
  $("heat-top").textContent = number(top, 2);
  $("heat-readout").textContent = `${task.name}: ${task.tokens.toLocaleString("en")} tokens`;
  arrows($("heat"), buttons);
}

function readUse(row, expert, use) {
  const count = data.places.filter((place) => place.layer === row.index).length;
  const name = row.site == null ? `layer ${row.layer} (mean of its sites, ${count} in all)` : data.places[row.site].path;
  $("heat-readout").textContent =
    `${name} · expert ${expert} · share ${number(use.share[expert])} · mean gate ` +
    `${number(use.gate[expert])} · entropy ${number(use.entropy)} · live experts ${number(use.live, 1)}`;
}

// One site over training -----------------------------------------------------------

function chart(svg, lines, top, label) {
  const steps = data.log.steps;
  const [width, height] = [svg.clientWidth || 400, 200];
  const [left, right, above, below] = [34, 10, 8, 22];
  const span = steps[steps.length - 1] - steps[0] || 1;
  const x = (step) => left + ((step - steps[0]) / span) * (width - left - right);
  const y = (value) => height - below - (value / top) * (height - above - below);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", label);
  svg.replaceChildren();
  for (const part of [0, 0.5, 1]) {
    const level = y(part * top);
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: level, y2: level }));
    svg.append(draw("text", { x: left - 5, y: level + 4, "text-anchor": "end" }, (part * top).toFixed(2)));
  }
  svg.append(draw("text", { x: left, y: height - 5 }, `step ${steps[0]}`));
  if (steps.length > 1) {
    svg.append(draw("text", { x: width - right, y: height - 5, "text-anchor": "end" }, steps[steps.length - 1]));
  }
  for (const line of lines) {
    let path = "";
    line.values.forEach((value, i) => {
      if (value == null) return;
      const joined = path && line.values[i - 1] != null;
      // a point by itself is drawn as a short stroke
      path += joined ? `L${x(steps[i])} ${y(value)}` : `M${x(steps[i]) - 2} ${y(value)}h2`;
    });
    const look = { class: line.class, d: path };
    if (line.dash) look["stroke-dasharray"] = line.dash;
    if (path) svg.append(draw("path", look));
  }
  const now = x(steps[shown.step]);
  svg.append(draw("line", { class: "cursor", x1: now, x2: now, y1: above, y2: height - below }));
  svg.onpointermove = svg.onpointerdown = (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const far = steps.map((step) => Math.abs(x(step) - at));
    shown.step = far.indexOf(Math.min(...far));
    $("step").value = shown.step;
    drawLog();
  };
}

function drawLog() {
  const log = data.log;
  const site = log.missing ? null : log.sites[shown.site];
  $("log").hidden = !site;
  if (log.missing) {
    $("log-note").textContent = `No training log: ${log.missing}. Training writes it every training.logging_steps steps.`;
  } else if (!site) {
    $("log-note").textContent = `The training log has no line of this site (${log.file}).`;
  } else {
    const part = log.steps.length < log.logged ? `${log.steps.length} of ${log.logged}` : log.logged;
    $("log-note").textContent = `${part} logged steps, from ${log.file}.`;
  }
  if (!site) return;
  const load = site[$("load").value];
  const experts = Math.max(...load.map((values) => (values ? values.length : 0)));
  const top = Math.max(0.1, Math.ceil(10 * Math.max(...load.flatMap((values) => values || []))) / 10);
  const step = log.steps[shown.step];
  const lines = Array.from({ length: experts }, (_, e) => ({
    class: `c${e % COLOURS}`,
    dash: e < COLOURS ? null : DASHES[Math.floor(e / COLOURS) % DASHES.length],
    values: load.map((values) => (values ? values[e] : null)),
  }));
  chart($("load-chart"), lines, top, `Load of ${experts} experts over training; values below`);
  const entropy = [{ class: "all", values: log.entropy }, { class: "one", values: site.entropy }];
  chart($("entropy-chart"), entropy, 1, "Entropy over training; values below");
  $("step-name").textContent = `step ${step}`;
  $("step").setAttribute("aria-valuetext", `step ${step}`);
  $("entropy-readout").textContent =
    `step ${step} · entropy ${number(site.entropy[shown.step])} · mean of all sites ${number(log.entropy[shown.step])}`;
  expertList($("load-readout"), load[shown.step] || []);
}

// Token by token -------------------------------------------------------------------

function drawTokens() {
  const text = data.texts[shown.text];
  const gates = text && text.gates[shown.site];
  $("strip").hidden = !text;
  $("text-choice").hidden = data.texts.length < 2;
  $("text-note").textContent = !text
    ? "No text was given: write the page with --prompt TEXT to see its tokens."
    : gates
      ? "Each token has the colour and number of its top expert. Click one for its gates."
      : "This site did not see all tokens of the text.";
  if (!text) return;
  const buttons = (gates ? text.tokens : []).map((token, index) => {
    const top = Math.max(...gates[index]);
    const expert = top > 0 ? gates[index].indexOf(top) : null;
    const visible = token.replace(/\n/g, "↵").replace(/\t/g, "⇥");
    const look = expert == null ? "idle" : `c${expert % COLOURS}`;
    const name = `${token}, ${expert == null ? "no expert" : `expert ${expert}`}`;
    const button = make("button", { type: "button", class: look, "aria-label": name }, visible);
    button.append(make("small", {}, expert == null ? "–" : expert));
    button.setAttribute("aria-pressed", index === shown.token);
    button.onclick = () => {
      shown.token = index;
      buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
      readToken();
    };
    return button;
  });
  $("tokens").replaceChildren(...buttons);
  arrows($("tokens"), [buttons]);
  if (buttons.length) buttons[0].tabIndex = -1, (buttons[shown.token].tabIndex = 0);
  readToken();
}

function readToken() {
  const text = data.texts[shown.text];
  const gates = text.gates[shown.site];
  const values = gates ? gates[shown.token] : [];
  $("token-readout").textContent = gates
    ? `token ${shown.token + 1} of ${text.tokens.length}: ${JSON.stringify(text.tokens[shown.token])}`
    : "";
  expertList($("token-gates"), values, Math.max(1, ...values));
}

// Similarity -----------------------------------------------------------------------

function drawSimilarity() {
  const cosine = data.similarity[shown.site];
  const body = make("tbody");
  const buttons = cosine.map((row, i) => {
    const cells = row.map((value, j) => {
      const label = `experts ${i} and ${j}, cosine ${number(value)}`;
      const button = make("button", { type: "button", "aria-label": label }, short(value));
      if (value == null) button.classList.add("none");
      else tint(button, Math.abs(value), value < 0);
      button.onmouseenter = button.onfocus = button.onclick = () => {
        $("similarity-readout").textContent = `experts ${i} and ${j} · cosine ${number(value)}`;
      };
      return button;
    });
    body.append(make("tr", {}, make("th", { scope: "row" }, `e${i}`), ...cells.map((b) => make("td", {}, b))));
    return cells;
  });
  const zero = cosine.flatMap((row, i) => (row[i] == null ? [`e${i}`] : []));
  $("similarity").style.setProperty("--experts", cosine.length);
  $("similarity").replaceChildren(expertHeads(cosine.length), body);
  $("similarity").setAttribute("aria-label", "Cosine, experts by experts");
  const pairs = cosine.flatMap((row, i) => row.slice(0, i).map((value, j) => ({ value, i: j, j: i })));
  const known = pairs.filter((pair) => pair.value != null).sort((a, b) => b.value - a.value);
  $("similarity-readout").textContent = known.length
    ? `most alike: experts ${known[0].i} and ${known[0].j} · cosine ${number(known[0].value)}`
    : "";
  $("similarity-note").textContent = zero.length
    ? `No direction, because the update is zero: ${zero.join(", ")}.`
    : "";
  arrows($("similarity"), buttons);
}

// All together ---------------------------------------------------------------------

function showSite(index) {
  shown.site = index;
  $("site").value = index;
  document.querySelectorAll("#heat tbody tr").forEach((line, row) => {
    const chosen = useRows()[row].site === index;
    line.querySelectorAll("button").forEach((b) => b.classList.toggle("chosen", chosen));
  });
  drawLog();
  drawTokens();
  drawSimilarity();
}

$("title").textContent = data.title;
$("summary").textContent =
  `${data.tasks[0].tokens.toLocaleString("en")} tokens routed at ${data.places.length} sites in ${data.layers.length} layers.`;
options($("task"), data.tasks.map((task) => task.name));
options($("module"), [MEAN, ...new Set(data.places.map((place) => place.module))]);
options($("site"), data.places.map((p) => p.path), data.places.map((p) => data.layers[p.layer]));
options($("text"), data.texts.map((text, i) => `${i + 1}: ${text.tokens.join("").slice(0, 60)}`));
for (const id of ["task", "module", "measure"]) $(id).onchange = drawHeat;
$("site").onchange = () => showSite(+$("site").value);
$("load").onchange = drawLog;
$("text").onchange = () => {
  [shown.text, shown.token] = [+$("text").value, 0];
  drawTokens();
};
if (!data.log.missing) {
  shown.step = data.log.steps.length - 1;
  $("step").max = shown.step;
  $("step").value = shown.step;
  $("step").oninput = () => {
    shown.step = +$("step").value;
    drawLog();
  };
}
window.onresize = drawLog;
drawHeat();
showSite(0);
