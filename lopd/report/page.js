"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";
  const PAGE = 12; // items shown at a time

  // Everything from the data goes into text nodes, never into markup.
  function make(tag, props, ...children) {
    const node = document.createElement(tag);
    Object.assign(node, props);
    node.append(...children);
    return node;
  }

  // "π_ref" with a true subscript.
  function math(text) {
    return text.split(/π_(T|θ|ref)/).flatMap((part, i) => (i % 2 ? ["π", make("sub", {}, part)] : [part]));
  }

  function fixed(value, digits) {
    const text = Math.abs(value).toFixed(digits);
    return (value < 0 && Number(text) ? "−" : "") + text;
  }

  function signed(value, digits = 2) {
    return (value > 0 && Number(value.toFixed(digits)) ? "+" : "") + fixed(value, digits);
  }

  function compact(value) {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    if (size && size < 1e-3) return value.toExponential(2).replace("-", "−").replace("e−", "e−");
    return String(Number(value.toPrecision(4))).replace("-", "−");
  }

  function table(head, rows) {
    const cells = (tag, row) => make("tr", {}, ...row.map((text, i) =>
      make(i || tag === "th" ? tag : "th", {}, ...math(String(text)))));
    const body = make("tbody", {}, ...rows.map((row) => cells("td", row)));
    return make("table", {}, ...(head ? [make("thead", {}, cells("th", head))] : []), body);
  }

  // The tip stands below the given box, or above it, and always inside the window.
  function showTip(box, ...content) {
    tip.replaceChildren(...content);
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - size.width - 8);
    const below = box.bottom + 8 + size.height < innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  // ---- Read-outs of the curves -------------------------------------------------------------

  function nearest(values, x) {
    let best = 0;
    for (let i = 1; i < values.length; i++) {
      if (Math.abs(values[i] - x) < Math.abs(values[best] - x)) best = i;
    }
    return best;
  }

  function readOut(figure) {
    const plot = data.plots[figure.dataset.plot];
    const svg = figure.querySelector("svg");
    const layer = document.createElementNS(SVG, "g");
    svg.append(layer);
    const [x0, y0, x1, y1] = plot.data;
    const [left, bottom, right, top] = plot.box;
    const scale = plot.log ? Math.log : (v) => v;
    const toX = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    const toY = (y) => bottom + ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (top - bottom);
    // SVG units per CSS pixel are not 1, and its viewBox may start anywhere: let the SVG convert.
    const toData = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY);
      const x = point.matrixTransform(svg.getScreenCTM().inverse()).x;
      return x0 + ((x - left) / (right - left)) * (x1 - x0);
    };
    let at = null;

    function draw(x) {
      const longest = plot.series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
      at = longest.x[nearest(longest.x, x)];
      const line = document.createElementNS(SVG, "line");
      line.setAttribute("class", "cursor");
      for (const [name, value] of [["x1", toX(at)], ["x2", toX(at)], ["y1", top], ["y2", bottom]]) {
        line.setAttribute(name, value);
      }
      layer.replaceChildren(line);
      const rows = [];
      for (const series of plot.series) {
        const i = nearest(series.x, at);
        const value = series.y[i];
        const unit = plot.unit ? ` ${plot.unit}` : "";
        const where = series.x[i] === at ? "" : ` at ${compact(series.x[i])}`;
        rows.push([series.label + where, compact(value) + unit]);
        if (value === null || (plot.log && value <= 0)) continue;
        const dot = document.createElementNS(SVG, "circle");
        dot.setAttribute("class", `dot c${series.colour}`);
        dot.setAttribute("r", 4);
        dot.setAttribute("cx", toX(series.x[i]));
        dot.setAttribute("cy", toY(value));
        layer.append(dot);
      }
      const frame = svg.getBoundingClientRect();
      const px = frame.left + (toX(at) / svg.viewBox.baseVal.width) * frame.width;
      const box = { left: px + 10, bottom: frame.bottom - 20, top: frame.top };
      showTip(box, make("div", { className: "head" }, ...math(`${plot.x}: ${compact(at)}`)), table(null, rows));
    }

    function clear() {
      layer.replaceChildren();
      at = null;
      hideTip();
    }

    svg.addEventListener("pointermove", (event) => draw(toData(event)));
    svg.addEventListener("pointerdown", (event) => draw(toData(event)));
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && clear());
    document.addEventListener("pointerdown", (event) => {
      if (at !== null && !svg.contains(event.target)) clear();
    });
    figure.addEventListener("blur", clear);
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") clear();
      if (!move) return;
      event.preventDefault();
      const xs = plot.series.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
      const step = Math.max(1, Math.round(xs.length / 80));
      const i = at === null ? (move > 0 ? 0 : xs.length - 1) : nearest(xs, at) + move * step;
      draw(xs[Math.min(Math.max(0, i), xs.length - 1)]);
    });
  }

  document.querySelectorAll("[data-plot]").forEach(readOut);

  // ---- A list that shows a page at a time ---------------------------------------------------

  function browser(name, noun, select, render) {
    const controls = document.getElementById(`${name}-controls`);
    if (!controls) return null;
    const list = document.getElementById(`${name}-list`);
    const count = document.getElementById(`${name}-count`);
    const more = document.getElementById(`${name}-more`);
    let found = [];
    let shown = 0;

    const value = (field) => {
      const input = controls.querySelector(`[name="${field}"]:checked, select[name="${field}"], [type="search"][name="${field}"]`);
      return input ? input.value : "";
    };

    function extend() {
      list.append(...found.slice(shown, shown + PAGE).map((item) => render(item, value)));
      shown = Math.min(found.length, shown + PAGE);
      more.hidden = shown >= found.length;
      more.textContent = `Show more (${found.length - shown} left)`;
    }

    function refresh() {
      const all = select(value);
      found = all.found;
      shown = 0;
      list.replaceChildren();
      count.textContent = `${found.length} of ${all.of} ${noun}`;
      extend();
    }

    controls.addEventListener("input", refresh);
    more.addEventListener("click", extend);
    refresh();
    return { controls, list, refresh };
  }

  // ---- Rollouts -----------------------------------------------------------------------------

  const FULL = 3; // nats at which a token has its full colour

  function mean(values) {
    return values.reduce((a, b) => a + b, 0) / values.length;
  }

  for (const [place, r] of data.rollouts.entries()) {
    r.place = place;
    r.text = `${r.prompt}${r.tokens.join("")}`.toLowerCase();
    r.advantage = {};
    r.stats = {};
    for (const when of ["before", "after"]) {
      const values = r.teacher.map((t, i) => t - r[when][i]);
      r.advantage[when] = values;
      r.stats[when] = { mean: mean(values), abs: mean(values.map(Math.abs)), worst: Math.min(...values) };
    }
    r.change = r.stats.after.abs - r.stats.before.abs;
  }

  function selectRollouts(value) {
    const text = value("text").toLowerCase();
    const when = value("when");
    const keys = {
      cache: (r) => r.place,
      worst: (r) => r.stats[when].worst,
      mean: (r) => r.stats[when].mean,
      change: (r) => r.change,
      length: (r) => r.tokens.length,
    };
    const key = keys[value("sort")];
    const order = Number(value("order"));
    const found = data.rollouts.filter((r) =>
      (!value("finished") || r.finished === (value("finished") === "1")) &&
      (!value("run") || r.run === Number(value("run"))) &&
      (!text || r.text.includes(text)));
    found.sort((a, b) => order * (key(a) - key(b)) || a.place - b.place);
    return { found, of: data.rollouts.length };
  }

  function colour(advantage) {
    const strength = Math.min(Math.abs(advantage) / FULL, 1) * 0.62;
    if (strength < 0.02) return "";
    return `rgb(var(--${advantage < 0 ? "less" : "more"}) / ${strength.toFixed(2)})`;
  }

  function visible(token) {
    return token.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t") || "∅";
  }

  function tokenTip(node) {
    const r = data.rollouts[node.parentNode.dataset.place];
    const i = Number(node.dataset.i);
    const row = (label, logprob, advantage = "") =>
      [label, fixed(logprob, 3), `${(100 * Math.exp(logprob)).toPrecision(3)} %`, advantage];
    const { before, after } = r.advantage;
    showTip(
      node.getBoundingClientRect(),
      make("div", { className: "head" }, `“${r.tokens[i].replace(/\n/g, "↵")}” · token ${i + 1} of ${r.tokens.length}`),
      table(["nats", "log π", "π", "A"], [
        row("teacher", r.teacher[i]),
        row("before, π_ref", r.before[i], signed(before[i], 3)),
        row("after, π_θ", r.after[i], signed(after[i], 3)),
      ]),
    );
  }

  function renderRollout(r, value) {
    const when = value("when");
    const { before, after } = r.stats;
    const meta = make("div", { className: "meta" },
      ...(data.runs.length > 1 ? [make("b", {}, data.runs[r.run])] : []),
      make("span", {}, `prompt ${r.id}`),
      make("span", {}, `${r.tokens.length} tokens, ${r.finished ? "finished" : "cut at the cap"}`));
    const stats = make("div", { className: "meta" },
      make("span", {}, "mean A ", make("b", {}, `${signed(before.mean)} → ${signed(after.mean)}`)),
      make("span", {}, "mean |A| ", make("b", {}, `${fixed(before.abs, 2)} → ${fixed(after.abs, 2)}`)),
      make("span", {}, "worst token ", make("b", {}, `${signed(before.worst)} → ${signed(after.worst)}`)));
    const tokens = make("div", { className: "tokens" });
    tokens.dataset.place = r.place;
    r.tokens.forEach((token, i) => {
      const span = make("span", { tabIndex: i ? -1 : 0 }, visible(token));
      span.dataset.i = i;
      span.style.background = colour(r.advantage[when][i]);
      if (/^<.+>$/.test(token)) span.className = "special";
      tokens.append(span);
    });
    const prompt = make("div", { className: "prompt" }, r.prompt.trimEnd());
    return make("article", { className: "item" }, meta, prompt, tokens, stats);
  }

  const rollouts = browser("rollout", "rollouts", selectRollouts, renderRollout);
  if (rollouts) {
    const { controls, list } = rollouts;
    const token = (event) => event.target.closest(".tokens span");
    list.addEventListener("pointerover", (event) => token(event) ? tokenTip(token(event)) : hideTip());
    list.addEventListener("pointerleave", hideTip);
    list.addEventListener("focusin", (event) => token(event) && tokenTip(token(event)));
    list.addEventListener("focusout", hideTip);
    list.addEventListener("click", (event) => {
      token(event)?.focus({ preventScroll: true });
      if (token(event)) tokenTip(token(event));
    });

    // Before or after: recolour in place, so that one can watch a token change.
    function recolour() {
      const when = controls.querySelector("[name=when]:checked").value;
      for (const span of list.querySelectorAll(".tokens span")) {
        const r = data.rollouts[span.parentNode.dataset.place];
        span.style.background = colour(r.advantage[when][span.dataset.i]);
      }
    }

    list.addEventListener("keydown", (event) => {
      const node = token(event);
      if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
      const spans = [...node.parentNode.children];
      const items = [...list.children];
      const item = node.closest(".item");
      const i = Number(node.dataset.i);
      const inItem = (offset) => {
        const other = items[items.indexOf(item) + offset]?.querySelectorAll(".tokens span");
        return other?.[Math.min(i, other.length - 1)];
      };
      const target = {
        ArrowLeft: () => spans[i - 1],
        ArrowRight: () => spans[i + 1],
        Home: () => spans[0],
        End: () => spans.at(-1),
        ArrowUp: () => inItem(-1),
        ArrowDown: () => inItem(1),
      }[event.key]?.();
      if (event.key === "Escape") hideTip();
      if (event.key.toLowerCase() === "b") {
        const other = controls.querySelector("[name=when]:not(:checked)");
        other.checked = true;
        recolour();
        tokenTip(node);
      }
      if (!target) return;
      event.preventDefault();
      target.focus();
    });
  }

  // ---- Evaluation responses -----------------------------------------------------------------

  const evaluation = data.evaluation;

  function selectResponses(value) {
    const [model, mode, verdict] = [value("model"), value("mode"), value("verdict")];
    const text = value("text").toLowerCase();
    const wanted = (p) => {
      const own = p.models[model]?.[mode];
      const sft = p.models.sft?.[mode];
      if (!own || (value("run") && p.run !== Number(value("run")))) return false;
      if (value("test") && p.test !== value("test")) return false;
      // True, false, or null without a verdict.
      if (verdict === "gained" && !(own[1] && sft?.[1] === false)) return false;
      if (verdict === "lost" && !(own[1] === false && sft?.[1])) return false;
      if (verdict === "none" && own[1] !== null) return false;
      if ((verdict === "1" || verdict === "0") && own[1] !== (verdict === "1")) return false;
      return !text || `${p.prompt}${own[0]}`.toLowerCase().includes(text);
    };
    return { found: evaluation.problems.filter(wanted), of: evaluation.problems.length };
  }

  function look(correct) {
    return correct === null ? "" : correct ? "right" : "wrong";
  }

  function renderResponse(p, value) {
    const [model, mode] = [value("model"), value("mode")];
    const [text, correct, finished] = p.models[model][mode];
    const others = evaluation.models.filter((m) => m !== model && p.models[m]?.[mode]).map((m) => {
      const right = p.models[m][mode][1];
      const chip = make("span", { className: `chip ${look(right)}` }, `${data.titles[m]} ${right === null ? "?" : right ? "✓" : "✗"}`);
      chip.title = p.models[m][mode][0];
      return chip;
    });
    const word = correct ? "✓ correct" : correct === null ? "? not graded" : finished ? "✗ incorrect" : "✗ cut at the cap";
    return make("article", { className: "item" },
      make("div", { className: "meta" },
        ...(data.runs.length > 1 ? [make("b", {}, data.runs[p.run])] : []),
        ...(evaluation.tests.length > 1 ? [make("span", {}, p.test)] : []),
        make("span", { className: `verdict ${look(correct)}` }, word),
        make("span", {}, "answer ", make("b", {}, String(p.answer))), ...others),
      make("div", { className: "prompt" }, p.prompt.trimEnd()),
      make("div", { className: "answer" }, text));
  }

  browser("response", "problems", selectResponses, renderResponse);
})();
