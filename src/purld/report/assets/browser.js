"use strict";
// The browser of prompts and answers. Model output enters the page as text nodes only.
(() => {
  const root = document.getElementById("browser");
  if (!root) return;
  const { runs, titles, pairs, images, entries } = JSON.parse(document.getElementById("data").textContent);

  // Characters that are invisible or reorder the text around them, without line breaks and tabs. The last one marks an
  // image, in prompts only.
  const INVISIBLE = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\ufffc]/gu;
  const IMAGE = "\ufffc";
  const PIXEL_ART = 96; // an image with no side longer than this is enlarged pixel by pixel

  const NOTE = "u is the confidence that a candidate is as good as the anchor, D the label distribution over the " +
    "group, q the policy's own distribution over it.";
  const LEFT_OUT = "No update learned from this group: its scores gave no signal.";
  const TWICE = "q before belongs to the policy that drew the candidates, q after to the final policy.";

  // The two models that every run compares, by name where they are the same in all runs.
  const same = pairs.every((p) => p.before === pairs[0].before && p.after === pairs[0].after);
  const titleOf = (model) => titles[model] ?? model;
  const [before, after] = same ? [titleOf(pairs[0].before), titleOf(pairs[0].after)] : ["before", "after"];

  const FILTERS = {
    differ: [`${before} and ${after} differ`, (e) => e.differs],
    all: ["All prompts", () => true],
    held: ["Held-out answers", (e) => e.answers.length > 0],
    groups: ["Stage II candidates", (e) => Boolean(e.group)],
    fixed: [`${before} wrong, ${after} right`, (e) => e.right.before === false && e.right.after === true],
    broken: [`${before} right, ${after} wrong`, (e) => e.right.before === true && e.right.after === false],
    win: [`Judge: ${after} wins`, (e) => e.outcome === "win"],
    tie: ["Judge: tie", (e) => e.outcome === "tie"],
    loss: [`Judge: ${after} loses`, (e) => e.outcome === "loss"],
    unjudged: ["Unjudged", (e) => e.outcome === "unjudged"],
    revisited: ["q before and after", (e) => Boolean(e.group?.divergence)],
    unscored: ["Unscored candidates", (e) => e.group?.candidates.some((c) => c.score === null)],
    cut: ["Cut off", (e) => e.answers.some((a) => a.samples.some((s) => s.finished === false))],
  };

  function el(name, properties = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "class") node.className = value;
      else if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  // A paragraph of model output: text nodes, and the code point of every invisible character.
  function paragraph(text, className = "") {
    const node = el("p", { class: `words ${className}`, dir: "auto" });
    let start = 0;
    for (const match of text.matchAll(INVISIBLE)) {
      node.append(text.slice(start, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(el("span", { class: "control", textContent: `U+${code}`, title: "invisible character" }));
      start = match.index + match[0].length;
    }
    node.append(text.slice(start));
    return node;
  }

  // A prompt's text, with a numbered mark for each image; a single image in front of the text has no mark.
  function question(entry) {
    const text = entry.images?.length === 1 ? entry.prompt.replace(/^\ufffc\s*/u, "") : entry.prompt;
    const node = el("p", { class: "words question", dir: "auto" });
    let number = 0;
    for (const piece of text.split(/(\ufffc)/u)) {
      if (piece === IMAGE && entry.images) node.append(chip(`image ${(number += 1)}`));
      else node.append(...paragraph(piece).childNodes);
    }
    return node;
  }

  // A prompt in one line, for the list.
  const firstLine = (entry) => (entry.images ? entry.prompt.replace(/^[\ufffc\s]+/u, "").replaceAll(IMAGE, "[image]")
    : entry.prompt).slice(0, 160);

  function imageElement(name, number, count) {
    const alt = count > 1 ? `image ${number} of the prompt` : "the prompt's image";
    if (!(name in images)) return chip(`${alt} is not on this page`);
    const node = el("img", { alt, decoding: "async" });
    node.addEventListener("load", () => {
      node.classList.toggle("pixels", Math.max(node.naturalWidth, node.naturalHeight) <= PIXEL_ART);
    });
    node.src = images[name];
    return node;
  }

  function imageRow(entry) {
    if (!entry.images) return null;
    const count = entry.images.length;
    return el("div", { class: "images" }, ...entry.images.map((name, index) => el("figure", {},
      imageElement(name, index + 1, count), count > 1 ? el("figcaption", { textContent: `image ${index + 1}` }) : null)));
  }

  const chip = (text, tone = "") => el("span", { class: `chip ${tone}`, textContent: text });
  const rightChip = (right) => chip(right ? "right" : "wrong", right ? "good" : "bad");
  const TONES = { win: "good", loss: "bad", tie: "open", unjudged: "open" };

  // ---- Fields for the filters and the search ----

  function addFilterFields(entry) {
    const samplesOf = (model) => entry.answers.find((a) => a.model === model)?.samples ?? [];
    const [before, after] = [samplesOf(pairs[entry.run].before), samplesOf(pairs[entry.run].after)];
    const judged = (samples) => overallOutcome(samples.find((s) => s.verdicts)?.verdicts);
    entry.right = { before: before[0]?.correct, after: after[0]?.correct };
    entry.outcome = judged(after) ?? judged(before);
    entry.tally = [tally(before), tally(after)];
    entry.change = changeBetween(entry.tally, [judged(before), judged(after)]);
    entry.differs = before.length > 0 && after.length > 0
      && (entry.change === undefined ? before[0].text !== after[0].text : entry.change !== 0);
    entry.haystack = [
      entry.prompt, entry.anchor, entry.id,
      ...entry.answers.flatMap((a) => a.samples.map((s) => s.text)),
      ...(entry.group?.candidates.map((c) => c.text) ?? []),
    ].join("\n").toLowerCase();
  }

  // How many of a model's answers are right, greedy and sampled together; undefined if they were not checked.
  function tally(samples) {
    const checked = samples.filter((s) => s.correct !== undefined);
    return checked.length ? { right: checked.filter((s) => s.correct).length, of: checked.length } : undefined;
  }

  const POINTS = { win: 1, tie: 0.5, loss: 0 };

  // How much better the second model is on a prompt, by gold or else by the judge; undefined if neither is known.
  function changeBetween([before, after], outcomes) {
    if (before && after) return after.right / after.of - before.right / before.of;
    const [from, to] = outcomes.map((outcome) => POINTS[outcome]);
    return from === undefined || to === undefined ? undefined : to - from;
  }

  // The outcome over both orders: their mean, a tie counting half; unjudged only if both orders are.
  function overallOutcome(verdicts) {
    if (!verdicts) return undefined;
    const judged = verdicts.filter((v) => v.outcome in POINTS);
    if (!judged.length) return "unjudged";
    const mean = judged.reduce((sum, v) => sum + POINTS[v.outcome], 0) / judged.length;
    return mean > 0.5 ? "win" : mean < 0.5 ? "loss" : "tie";
  }

  // ---- One entry in full ----

  function detail(entry) {
    const origin = [
      runs.length > 1 ? chip(runs[entry.run]) : null,
      entry.answers.length ? chip("held out") : null,
      entry.group ? chip(`Stage II, step ${entry.group.step}`) : null,
      chip(entry.id),
    ];
    return [
      el("h3", { textContent: "Prompt" }),
      imageRow(entry),
      entry.prompt ? question(entry) : paragraph("(the prompt was not recorded)", "question"),
      el("div", { class: "chips" }, ...origin),
      ...(entry.anchor === undefined ? [] : anchorBlock(entry)),
      ...(entry.answers.length ? [el("h3", { textContent: "Held-out answers" }), answerRow(entry)] : []),
      ...(entry.group ? candidateList(entry.group) : []),
    ];
  }

  function anchorBlock(entry) {
    const value = entry.group?.anchor_score ?? null; // null in a method without self-evaluation
    const score = value === null ? "" : `, scored ${value.toFixed(2)} by the frozen SFT model`;
    return [
      el("h3", { textContent: `The teacher's anchor${score}` }),
      el("div", { class: "anchor" }, paragraph(entry.anchor)),
    ];
  }

  function answerRow(entry) {
    return el("div", { class: "answers" }, ...entry.answers.map((answer) => {
      const [first, ...rest] = answer.samples;
      return el("article", { class: "answer" },
        el("h4", { textContent: titles[answer.model] ?? answer.model }), ...sampleBlock(first), moreSamples(rest));
    }));
  }

  function sampleBlock(s) {
    const marks = [
      s.correct === undefined ? null : rightChip(s.correct),
      ...(s.verdicts ?? []).map(verdictChip),
      s.greedy ? chip("greedy") : null,
      s.tokens === undefined ? null : chip(`${s.tokens} tokens`),
      s.finished === false ? chip("cut off", "open") : null,
    ];
    const unjudged = (s.verdicts ?? []).filter((v) => v.outcome === "unjudged");
    return [
      el("div", { class: "chips" }, ...marks),
      paragraph(s.text || "(empty)"),
      ...unjudged.map((v) => el("div", { class: "said" }, "The judge said:", paragraph(v.raw || "(nothing)"))),
    ];
  }

  function verdictChip(verdict) {
    const mark = chip(`${verdict.outcome} as ${verdict.a ? "A" : "B"}`, TONES[verdict.outcome]);
    mark.title = `The judge said: ${verdict.raw}`;
    return mark;
  }

  function moreSamples(samples) {
    if (!samples.length) return null;
    const checked = samples.filter((s) => s.correct !== undefined);
    const right = checked.length ? `, ${checked.filter((s) => s.correct).length} right` : "";
    return el("details", {}, el("summary", { textContent: `${samples.length} more${right}` }),
      ...samples.map((s) => el("div", { class: "sample" }, ...sampleBlock(s))));
  }

  function candidateList(group) {
    const sorted = [...group.candidates].sort((a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity) || 0);
    const largest = Math.max(...sorted.flatMap((c) => [c.D ?? 0, c.q ?? 0, c.after ?? 0]));
    const heading = sorted.length === 1 ? "The student's candidate" : `The student's ${sorted.length} candidates`;
    const order = sorted.length > 1 && typeof sorted[0].score === "number" ? ", best score first" : "";
    return [
      el("h3", { textContent: heading + order }),
      group.left_out ? el("p", { class: "note", textContent: LEFT_OUT }) : null,
      sorted[0].D === undefined ? null : el("p", { class: "note", textContent: group.divergence ? `${NOTE} ${TWICE}` : NOTE }),
      group.divergence ? el("div", { class: "chips" }, divergenceChip(...group.divergence)) : null,
      el("ol", { class: "candidates" }, ...sorted.map((c) =>
        el("li", { class: "candidate" }, measureList(c, largest), paragraph(c.text || "(empty)")))),
    ];
  }

  // KL(D‖q) of the group before and after; an infinite or undefined value arrives as null.
  function divergenceChip(before, after) {
    const [from, to] = [before, after].map((value) => (value === null ? "–" : value.toFixed(3)));
    const changed = before !== null && after !== null && after !== before;
    return chip(`KL(D‖q) ${from} before, ${to} after`, changed ? (after < before ? "good" : "bad") : "open");
  }

  function measureList(c, largest) {
    const row = (name, value, kind, share) => {
      const bar = el("i", { hidden: share === undefined });
      if (share !== undefined) bar.style.width = `${100 * share}%`;
      const dd = el("dd", {}, el("span", { textContent: value === null ? "–" : value.toFixed(3).replace("-", "−") }), bar);
      return el("div", { class: kind }, el("dt", { textContent: name }), dd);
    };
    const share = (value) => (value === null ? undefined : value / largest);
    const rows = c.score === null
      ? [el("div", {}, chip("unscored", "open"))]
      : [ // measures that the method does not have are undefined
          ["score", c.score, "score"],
          ["margin", c.margin, "margin"],
          ["u", c.u, "u"],
          ["D", c.D, "D", share(c.D)],
          [c.after === undefined ? "q" : "q before", c.q, "q", share(c.q)],
          ["q after", c.after, "after", share(c.after)],
          ["A", c.advantage, "advantage"],
        ].filter(([, value]) => value !== undefined).map((columns) => row(...columns));
    return el("dl", { class: "measures" }, ...rows, el("div", {}, el("dt", { textContent: "tokens" }),
      el("dd", {}, el("span", { textContent: c.tokens }))));
  }

  // ---- The list, the filter and the search ----

  const search = el("input", { type: "search", placeholder: "Search prompts and answers", "aria-label": "Search prompts and answers" });
  const filter = el("select", { "aria-label": "Filter" });
  const count = el("output", { "aria-live": "polite" });
  const list = el("ul", { class: "list", "aria-label": "Prompts" });
  const pane = el("article", { class: "detail", tabIndex: -1, "aria-label": "The chosen prompt" });

  function listButton(entry) {
    const marks = [
      runs.length > 1 ? chip(runs[entry.run]) : null,
      changeChip(entry),
      entry.outcome === undefined ? null : chip(entry.outcome, TONES[entry.outcome]),
      entry.group ? chip(`step ${entry.group.step}`) : null,
    ];
    const line = paragraph(firstLine(entry) || entry.id);
    const first = entry.images?.find((name) => name in images);
    const thumbnail = first === undefined ? null : imageElement(first, 1, 1);
    if (thumbnail) thumbnail.alt = ""; // the text next to it names the prompt
    const text = el("button", { type: "button", class: thumbnail ? "with-image" : "" }, thumbnail,
      el("span", { class: "line", dir: "auto" }, ...line.childNodes), el("span", { class: "chips" }, ...marks));
    text.addEventListener("click", () => choose(entry));
    return text;
  }

  // Right answers before and after where their share changed, else whether the first answer is right.
  function changeChip(entry) {
    const [before, after] = entry.tally;
    if (before && after && entry.change !== 0) {
      const counts = `${before.right}/${before.of} → ${after.right}/${after.of} right`;
      return chip(counts, entry.change > 0 ? "good" : "bad");
    }
    return entry.right.after === undefined ? null : rightChip(entry.right.after);
  }

  // Tab reaches one prompt of the list, the chosen one if it is listed; the arrow keys move from there.
  function setTabStop() {
    const buttons = [...list.querySelectorAll("button")];
    const stop = buttons.find((b) => b.hasAttribute("aria-current")) ?? buttons[0];
    for (const b of buttons) b.tabIndex = b === stop ? 0 : -1;
  }

  function show(entry) {
    for (const other of list.querySelectorAll('[aria-current="true"]')) other.removeAttribute("aria-current");
    entry.button.setAttribute("aria-current", "true");
    pane.replaceChildren(...detail(entry).filter((part) => part !== null)); // a null would become the text "null"
    setTabStop();
  }

  function choose(entry) {
    show(entry);
    history.replaceState(null, "", `#prompt-${entry.run}-${entry.id}`);
  }

  // The order of prompts that differ: first where the answers that stand on top differ, then by the size of the change.
  const weight = (e) => 2 * (e.right.before !== e.right.after) + Math.abs(e.change ?? 0);

  function refresh() {
    const wanted = search.value.trim().toLowerCase();
    const passes = FILTERS[filter.value][1];
    const shown = entries.filter((e) => passes(e) && e.haystack.includes(wanted));
    if (filter.value === "differ") shown.sort((a, b) => weight(b) - weight(a));
    list.replaceChildren(...shown.map((e) => el("li", {}, e.button)));
    count.textContent = `${shown.length} of ${entries.length}`;
    setTabStop();
    if (!shown.length) list.append(el("li", { class: "none", textContent: "No prompt matches." }));
    return shown;
  }

  // Arrow keys, Home and End move in the list; "/" goes to the search.
  function onKey(event) {
    if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
      event.preventDefault();
      search.focus();
      return;
    }
    if (!list.contains(document.activeElement)) return;
    const buttons = [...list.querySelectorAll("button")];
    const current = buttons.indexOf(document.activeElement);
    const target = { ArrowDown: current + 1, ArrowUp: current - 1, Home: 0, End: buttons.length - 1 }[event.key];
    const next = buttons[target];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }

  entries.forEach(addFilterFields);
  for (const entry of entries) entry.button = listButton(entry);
  for (const [key, [name, passes]] of Object.entries(FILTERS)) {
    const matching = entries.filter(passes).length;
    if (matching) filter.append(el("option", { value: key, textContent: `${name} (${matching})` }));
  }
  search.addEventListener("input", refresh);
  filter.addEventListener("change", refresh);
  document.addEventListener("keydown", onKey);
  root.replaceChildren(
    el("div", { class: "controls" }, search, filter, count),
    el("div", { class: "panes" }, list, pane),
  );
  const linked = entries.find((e) => `#prompt-${e.run}-${e.id}` === location.hash);
  if (linked) filter.value = "all"; // the chosen prompt is always in the list
  show(linked ?? refresh()[0]);
  refresh();
  // A page that loads itself again stays where its reader was.
  if (linked && performance.getEntriesByType("navigation")[0]?.type !== "reload") {
    root.scrollIntoView();
    linked.button.scrollIntoView({ block: "nearest" });
  }
})();
