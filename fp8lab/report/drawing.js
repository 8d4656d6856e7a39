/* What the charts of a page share: words, colours, choosers, axes, panels; drawing.py has the same
   for the static pictures.

   Names come from models and are hostile until shown otherwise: the page's elements get them as
   textContent, and Plotly, which reads tags and links in every text, gets them through `text`. They
   are never part of a template. */
"use strict";

const drawing = (() => {
  const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true };
  const DARK = matchMedia("(prefers-color-scheme: dark)");
  const COARSE = matchMedia("(pointer: coarse)"); // there a drag scrolls the page
  const NARROW = matchMedia("(max-width: 680px)");
  const LOST = 30; // a line beyond this multiple of its start leaves the first view
  const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const MAGMA = ["#0d0829", "#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#fcfdbf"];

  /* ---- words and colours ---- */

  const text = (name) =>
    String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value) => (value === null ? "not recorded" : String(Number(value.toPrecision(4))));
  const percent = (share) => (share === null ? "" : `${Number((100 * share).toPrecision(3))} %`);
  const sup = (k) => String(k).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  const fit = (long, brief) => (NARROW.matches ? brief : long);
  const ending = (name) => (NARROW.matches && name.length > 16 ? `…${name.slice(-15)}` : name);
  const grey = (position) => ({ color: colour("--c8"), dash: DASHES[position % DASHES.length] });
  const styled = (position) => ({
    color: colour(COLOURS[position % COLOURS.length]),
    dash: DASHES[Math.floor(position / COLOURS.length) % DASHES.length],
  });

  /* ---- choosers ---- */

  const made = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };

  /* One of several; nothing to see where there is but one. */
  const choice = (label, names, chosen = 0) => {
    const options = names.map((name, at) => new Option(name, at, false, at === chosen));
    const input = made("select", {}, ...options);
    const element = made("label", { hidden: names.length < 2 }, made("span", { textContent: label }), input);
    const fill = (others) => input.replaceChildren(...others.map((name, at) => new Option(name, at)));
    return { element, input, fill, get at() { return Number(input.value); } };
  };

  /* One of a row of steps; `say` is what stands beside it. */
  const slider = (label, count, chosen = 0) => {
    const input = made("input", { type: "range", min: 0, max: count - 1, value: chosen });
    const said = made("output");
    const element = made("label", { className: "slider" }, made("span", { textContent: label }), input, said);
    const say = (words) => { said.textContent = words; input.setAttribute("aria-valuetext", words); };
    const resize = (length) => { input.max = length - 1; input.value = length - 1; };
    return { element, input, say, resize, get at() { return Number(input.value); } };
  };

  /* ---- what charts share ---- */

  const layout = (height, more) => ({
    height,
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--ink") },
    margin: { l: NARROW.matches ? 46 : 62, r: 14, t: 12, b: 44 },
    dragmode: COARSE.matches ? false : "zoom",
    hovermode: "closest",
    hoverlabel: {
      bgcolor: colour("--card"), bordercolor: colour("--soft"),
      font: { color: colour("--ink"), size: 12.5 }, align: "left", namelength: -1,
    },
    legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { size: 12 } },
    ...more,
  });

  const axis = (title, more = {}) => ({
    title: { text: title, font: { size: 12.5, color: colour("--soft") }, standoff: 8 },
    gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"),
    tickfont: { color: colour("--soft"), size: 11.5 }, tickformat: "~g", nticks: 6, ...more,
  });

  /* A log axis whose first view leaves out what explodes: all else would be a flat line. It would
     leave out what is negative, too. */
  const growing = (lines) => {
    if (lines.some((line) => line && line[1].some((y) => y < 0))) return axis("");
    const shown = lines.map((line) => (line ? line[1].filter((y) => y > 0) : [])).filter((y) => y.length);
    if (!shown.length) return axis("");
    const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
    const calm = Math.max(...shown.map((values) => Math.max(values[0], median(values))));
    const [low, high] = extent(shown.flat());
    return logarithmic(low, Math.max(low, Math.min(high, LOST * calm)));
  };
  const extent = (values) => values.filter((y) => y > 0).reduce(
    ([low, high], y) => [Math.min(low, y), Math.max(high, y)], [Infinity, 1e-30]);
  const logarithmic = (low, high) => {
    const [from, to] = [Math.log10(low), Math.log10(high)];
    const room = Math.max(0.04, 0.06 * (to - from));
    const ticks = to - from < 0.5 ? { dtick: "D1" } : to - from < 1.2 ? { dtick: "D2" }
      : { dtick: Math.ceil((to - from) / 5) };
    return axis("", { type: "log", range: [from - room, to + room], ...ticks });
  };

  const curve = (line, name, look, more = {}) => ({
    type: "scatter", mode: line[0].length === 1 ? "markers" : "lines", x: line[0], y: line[1],
    name: text(name), line: { width: 1.6, ...look }, marker: { color: look.color },
    hovertemplate: "%{y:.4g}", ...more,
  });

  /* Signs for what was noticed, as the static pictures have them. */
  const SIGNS = { finding: "triangle-down", loss: "square", end: "x", parted: "diamond" };
  const HUES = { finding: "--c5", loss: "--c2", end: "--c2", parted: "--c4" };
  const words = (mark) => [`step ${mark[0]}`, ...mark[1]].map(text).join("<br>");
  const signs = (marks, y, more = {}) => ({
    type: "scatter", mode: "markers", x: marks.map(([step]) => step), y, text: marks.map(words),
    showlegend: false, cliponaxis: false, hovertemplate: "%{text}<extra></extra>",
    marker: {
      symbol: marks.map(([, , kind]) => SIGNS[kind]), size: 11, opacity: 1,
      color: marks.map(([, , kind]) => colour(HUES[kind])), line: { width: 1, color: colour("--card") },
    },
    ...more,
  });
  const uprights = (marks, top) => marks.map(([step, , kind]) => ({
    type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: top, layer: "below",
    line: { width: 1, dash: "dot", color: colour(HUES[kind]) },
  }));

  /* Panels over one axis of steps, from top to bottom; the signs stand on the upper edge. */
  const stacked = (panels, marks, height) => {
    const all = panels.reduce((sum, panel) => sum + panel.share, 0);
    const gap = 34 / height; // room for a panel's title
    const drawn = { traces: [], axes: {}, titles: [] };
    let top = 1;
    panels.forEach((panel, at) => {
      const [id, key] = at ? [`y${at + 1}`, `yaxis${at + 1}`] : ["y", "yaxis"];
      const depth = panel.share / all;
      drawn.axes[key] = { ...panel.axis, domain: [Math.max(0, top - depth), top - gap] };
      drawn.titles.push({
        text: panel.title, xref: "paper", x: 0, xanchor: "left", yref: "paper", y: top - gap,
        yanchor: "bottom", yshift: 4, showarrow: false, font: { size: 12.5, weight: 600 },
      });
      drawn.traces.push(...panel.traces.map((trace) => ({ xaxis: "x", yaxis: id, ...trace })));
      top -= depth;
    });
    const next = panels.length + 1;
    if (marks.length) {
      drawn.traces.push(signs(marks, marks.map(() => 1), { yaxis: `y${next}` }));
      drawn.axes[`yaxis${next}`] = { overlaying: "y", visible: false, fixedrange: true, range: [0, 1] };
    }
    const steps = panels.flatMap((panel) => panel.traces.flatMap((trace) => trace.x));
    const first = steps.reduce((a, b) => Math.min(a, b), Infinity);
    const last = steps.reduce((a, b) => Math.max(a, b), -Infinity);
    const room = 0.5 + 0.012 * (last - first);
    return {
      data: drawn.traces,
      layout: layout(height, {
        ...drawn.axes, annotations: drawn.titles, shapes: uprights(marks, 1 - gap),
        xaxis: axis("step", {
          anchor: panels.length > 1 ? `y${panels.length}` : "y", range: [first - room, last + room], tickformat: "",
        }),
        hovermode: "x unified", hoversubplots: "axis",
      }),
    };
  };

  return {
    CONFIG, DARK, NARROW, MAGMA, text, colour, number, percent, sup, fit, ending, grey, styled, made,
    choice, slider, layout, axis, growing, extent, logarithmic, curve, signs, stacked,
  };
})();
