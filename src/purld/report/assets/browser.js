"use strict";
// The browser of prompts and answers. What models wrote reaches the page as text nodes only.
(() => {
  const root = document.getElementById("browser");
  if (!root) return;
  const { runs, titles, images, entries } = JSON.parse(document.getElementById("data").textContent);

  // Characters that are invisible or move the text around them; line breaks and tabs are neither. The last is the
  // place of an image, and stands for one in prompts alone.
  const INVISIBLE = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\ufffc]/gu;
  const IMAGE = "\ufffc";
  const PIXEL_ART = 96; // a picture with no longer side is shown pixel by pixel

  const NOTE = "u is the confidence that a candidate is as good as the anchor, D the label distribution over the " +
    "group, q the policy's own distribution over it.";
  const AFTER = "q before is that of the policy that drew the candidates, q after that of the final policy.";

  const FILTERS = {
    all: ["All prompts", () => true],
    held: ["Held-out answers", (e) => e.answers.length > 0],
    groups: ["Stage II candidates", (e) => Boolean(e.group)],
    fixed: ["SFT wrong, method right", (e) => e.right.sft === false && e.right.method === true],
    broken: ["SFT right, method wrong", (e) => e.right.sft === true && e.right.method === false],
    win: ["Judge: method wins", (e) => e.outcome === "win"],
    tie: ["Judge: tie", (e) => e.outcome === "tie"],
    loss: ["Judge: method loses", (e) => e.outcome === "loss"],
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

  // A paragraph of foreign words: text nodes, and a named mark for every invisible character.
  function words(text, className = "") {
    const node = el("p", { class: `words ${className}`, dir: "auto" });
    let from = 0;
    for (const found of text.matchAll(INVISIBLE)) {
      node.append(text.slice(from, found.index));
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(el("span", { class: "control", textContent: `U+${code}`, title: "invisible character" }));
      from = found.index + found[0].length;
    }
    node.append(text.slice(from));
    return node;
  }

  // A prompt's text: a numbered mark where an image stands, but for a single one before all text.
  function question(entry) {
    const shown = entry.images?.length === 1 ? entry.prompt.replace(/^\ufffc\s*/u, "") : entry.prompt;
    const node = el("p", { class: "words question", dir: "auto" });
    let number = 0;
    for (const piece of shown.split(/(\ufffc)/u)) {
      if (piece === IMAGE && entry.images) node.append(chip(`image ${(number += 1)}`));
      else node.append(...words(piece).childNodes);
    }
    return node;
  }

  // A prompt in one line.
  const brief = (entry) => (entry.images ? entry.prompt.replace(/^[\ufffc\s]+/u, "").replaceAll(IMAGE, "[image]")
    : entry.prompt).slice(0, 160);

  function picture(name, number, count) {
    const alt = count > 1 ? `image ${number} of the prompt` : "the prompt's image";
    if (!(name in images)) return chip(`${alt} is not on this page`);
    const node = el("img", { alt, decoding: "async" });
    node.addEventListener("load", () => {
      node.classList.toggle("pixels", Math.max(node.naturalWidth, node.naturalHeight) <= PIXEL_ART);
    });
    node.src = images[name];
    return node;
  }

  function pictures(entry) {
    if (!entry.images) return null;
    const count = entry.images.length;
    return el("div", { class: "pictures" }, ...entry.images.map((name, place) => el("figure", {},
      picture(name, place + 1, count), count > 1 ? el("figcaption", { textContent: `image ${place + 1}` }) : null)));
  }

  const chip = (text, tone = "") => el("span", { class: `chip ${tone}`, textContent: text });
  const rightness = (right) => chip(right ? "right" : "wrong", right ? "good" : "bad");
  const TONES = { win: "good", loss: "bad", tie: "open", unjudged: "open" };

  // ---- What the filters ask of an entry ----

  const isMethod = (model) => !["base", "sft", "opponent"].includes(model);

  function prepare(entry) {
    const first = (test) => entry.answers.find((a) => test(a.model))?.samples[0];
    const method = entry.answers.find((a) => isMethod(a.model)) ?? entry.answers.find((a) => a.model === "sft");
    entry.right = { sft: first((m) => m === "sft")?.correct, method: first(isMethod)?.correct };
    entry.outcome = overall(method?.samples.find((s) => s.verdicts)?.verdicts);
    entry.haystack = [
      entry.prompt, entry.anchor, entry.id,
      ...entry.answers.flatMap((a) => a.samples.map((s) => s.text)),
      ...(entry.group?.candidates.map((c) => c.text) ?? []),
    ].join("\n").toLowerCase();
  }

  // Both orders as one outcome: their mean, ties half; unjudged only if every order is.
  function overall(verdicts) {
    if (!verdicts) return undefined;
    const worth = { win: 1, tie: 0.5, loss: 0 };
    const judged = verdicts.filter((v) => v.outcome in worth);
    if (!judged.length) return "unjudged";
    const mean = judged.reduce((sum, v) => sum + worth[v.outcome], 0) / judged.length;
    return mean > 0.5 ? "win" : mean < 0.5 ? "loss" : "tie";
  }

  // ---- One entry in full ----

  function detail(entry) {
    const where = [
      runs.length > 1 ? chip(runs[entry.run]) : null,
      entry.answers.length ? chip("held out") : null,
      entry.group ? chip(`Stage II, step ${entry.group.step}`) : null,
      chip(entry.id),
    ];
    return [
      el("h3", { textContent: "Prompt" }),
      pictures(entry),
      entry.prompt ? question(entry) : words("(the question was not recorded)", "question"),
      el("div", { class: "chips" }, ...where),
      ...(entry.anchor === undefined ? [] : anchor(entry)),
      ...(entry.answers.length ? [el("h3", { textContent: "Held-out answers" }), answers(entry)] : []),
      ...(entry.group ? candidates(entry.group) : []),
    ];
  }

  function anchor(entry) {
    const own = entry.group?.anchor_score ?? null; // a method without self-evaluation has none
    const score = own === null ? "" : `, scored ${own.toFixed(2)} by the frozen SFT model`;
    return [
      el("h3", { textContent: `The teacher's anchor${score}` }),
      el("div", { class: "anchor" }, words(entry.anchor)),
    ];
  }

  function answers(entry) {
    return el("div", { class: "answers" }, ...entry.answers.map((answer) => {
      const [first, ...rest] = answer.samples;
      return el("article", { class: "answer" },
        el("h4", { textContent: titles[answer.model] ?? answer.model }), ...sample(first), more(rest));
    }));
  }

  function sample(s) {
    const marks = [
      s.correct === undefined ? null : rightness(s.correct),
      ...(s.verdicts ?? []).map(verdictChip),
      s.greedy ? chip("greedy") : null,
      s.tokens === undefined ? null : chip(`${s.tokens} tokens`),
      s.finished === false ? chip("cut off", "open") : null,
    ];
    const unjudged = (s.verdicts ?? []).filter((v) => v.outcome === "unjudged");
    return [
      el("div", { class: "chips" }, ...marks),
      words(s.text || "(empty)"),
      ...unjudged.map((v) => el("div", { class: "said" }, "The judge said:", words(v.raw || "(nothing)"))),
    ];
  }

  function verdictChip(verdict) {
    const mark = chip(`${verdict.outcome} as ${verdict.a ? "A" : "B"}`, TONES[verdict.outcome]);
    mark.title = `The judge said: ${verdict.raw}`;
    return mark;
  }

  function more(samples) {
    if (!samples.length) return null;
    const checked = samples.filter((s) => s.correct !== undefined);
    const right = checked.length ? `, ${checked.filter((s) => s.correct).length} right` : "";
    return el("details", {}, el("summary", { textContent: `${samples.length} more${right}` }),
      ...samples.map((s) => el("div", { class: "sample" }, ...sample(s))));
  }

  function candidates(group) {
    const sorted = [...group.candidates].sort((a, b) => (b.score ?? -1) - (a.score ?? -1));
    const largest = Math.max(...sorted.flatMap((c) => [c.D ?? 0, c.q ?? 0, c.after ?? 0]));
    const heading = sorted.length === 1 ? "The student's candidate" : `The student's ${sorted.length} candidates`;
    const order = sorted.length > 1 && sorted[0].score !== undefined ? ", best score first" : "";
    return [
      el("h3", { textContent: heading + order }),
      sorted[0].D === undefined ? null : el("p", { class: "note", textContent: group.divergence ? `${NOTE} ${AFTER}` : NOTE }),
      group.divergence ? el("div", { class: "chips" }, movement(...group.divergence)) : null,
      el("ol", { class: "candidates" }, ...sorted.map((c) =>
        el("li", { class: "candidate" }, measures(c, largest), words(c.text || "(empty)")))),
    ];
  }

  // How the objective on the group moved; an infinite or undefined value has become null.
  function movement(before, after) {
    const [from, to] = [before, after].map((value) => (value === null ? "–" : value.toFixed(3)));
    const closer = before !== null && after !== null && after !== before;
    return chip(`KL(D‖q) ${from} before, ${to} after`, closer ? (after < before ? "good" : "bad") : "open");
  }

  function measures(c, largest) {
    const row = (name, value, kind, share) => {
      const bar = el("i", { hidden: share === undefined });
      if (share !== undefined) bar.style.width = `${100 * share}%`;
      const dd = el("dd", {}, el("span", { textContent: value === null ? "–" : value.toFixed(3).replace("-", "−") }), bar);
      return el("div", { class: kind }, el("dt", { textContent: name }), dd);
    };
    const share = (value) => (value === null ? undefined : value / largest);
    const rows = c.score === null
      ? [el("div", {}, chip("unscored", "open"))]
      : [ // what the method does not have is undefined
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

  function button(entry) {
    const marks = [
      runs.length > 1 ? chip(runs[entry.run]) : null,
      entry.right.method === undefined ? null : rightness(entry.right.method),
      entry.outcome === undefined ? null : chip(entry.outcome, TONES[entry.outcome]),
      entry.group ? chip(`step ${entry.group.step}`) : null,
    ];
    const line = words(brief(entry) || entry.id);
    const first = entry.images?.find((name) => name in images);
    const small = first === undefined ? null : picture(first, 1, 1);
    if (small) small.alt = ""; // the line beside it names the prompt
    const text = el("button", { type: "button", class: small ? "pictured" : "" }, small,
      el("span", { class: "line", dir: "auto" }, ...line.childNodes), el("span", { class: "chips" }, ...marks));
    text.addEventListener("click", () => choose(entry));
    return text;
  }

  // Tab stops at one prompt of the list, the chosen one where it is shown, and the arrows go on from there.
  function reachable() {
    const buttons = [...list.querySelectorAll("button")];
    const stop = buttons.find((b) => b.hasAttribute("aria-current")) ?? buttons[0];
    for (const b of buttons) b.tabIndex = b === stop ? 0 : -1;
  }

  function show(entry) {
    for (const other of list.querySelectorAll('[aria-current="true"]')) other.removeAttribute("aria-current");
    entry.button.setAttribute("aria-current", "true");
    pane.replaceChildren(...detail(entry));
    reachable();
  }

  function choose(entry) {
    show(entry);
    history.replaceState(null, "", `#prompt-${entry.run}-${entry.id}`);
  }

  function refresh() {
    const wanted = search.value.trim().toLowerCase();
    const passes = FILTERS[filter.value][1];
    const shown = entries.filter((e) => passes(e) && e.haystack.includes(wanted));
    list.replaceChildren(...shown.map((e) => el("li", {}, e.button)));
    count.textContent = `${shown.length} of ${entries.length}`;
    reachable();
    if (!shown.length) list.append(el("li", { class: "none", textContent: "No prompt matches." }));
  }

  // Arrow keys, Home and End walk the list, "/" goes to the search.
  function onKey(event) {
    if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
      event.preventDefault();
      search.focus();
      return;
    }
    if (!list.contains(document.activeElement)) return;
    const buttons = [...list.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const place = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    const next = buttons[place];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }

  entries.forEach(prepare);
  for (const entry of entries) entry.button = button(entry);
  for (const [key, [name, passes]] of Object.entries(FILTERS)) {
    const found = entries.filter(passes).length;
    if (found) filter.append(el("option", { value: key, textContent: `${name} (${found})` }));
  }
  search.addEventListener("input", refresh);
  filter.addEventListener("change", refresh);
  document.addEventListener("keydown", onKey);
  root.replaceChildren(
    el("div", { class: "controls" }, search, filter, count),
    el("div", { class: "panes" }, list, pane),
  );
  const linked = entries.find((e) => `#prompt-${e.run}-${e.id}` === location.hash);
  refresh();
  show(linked ?? entries[0]);
  if (linked) {
    root.scrollIntoView();
    linked.button.scrollIntoView({ block: "nearest" });
  }
})();
