/* The page's charts: each takes the place of the static picture of its name, with its choosers.

   The data is what interactive.py picked; nothing is computed here but where to draw it. A chart is a
   function: data in; out come its choosers and `draw`, which says what to show for their state now.
   Without this script, in print, in a browser that cannot unpack and where a chart fails, the static
   picture stands. */
"use strict";

(() => {
  const {
    CONFIG, DARK, NARROW, MAGMA, text, colour, number, percent, sup, fit, ending, grey, styled, made,
    choice, slider, layout, axis, growing, extent, logarithmic, curve, signs, stacked,
  } = drawing;

  /* ---- the charts ---- */

  const losses = (data) => {
    const arm = choice("Arms", ["all", ...data.arms]);
    const seed = choice("Seeds", ["all", ...data.seeds], data.seed === null ? 0 : data.seed + 1);
    const below = data.quantities.slice(1);
    const second = choice("Below the loss", below.map(([, label]) => label));
    /* What runs in high precision is grey, in every chart, and nothing else is. */
    const before = (at) => data.precise.slice(0, at).filter((one) => one === data.precise[at]).length;
    const look = (at) => (data.precise[at] ? grey(before(at)) : styled(before(at)));
    const drawn = (key, runs, legend) => runs.filter((run) => run.lines[key]).map((run) =>
      curve(run.lines[key], data.arms[run.arm], look(run.arm), {
        legendgroup: `arm ${run.arm}`, opacity: 0.85, text: run.lines[key][0].map(() => text(run.name)),
        hovertemplate: "%{text}<br>step %{x}: %{y:.4g}<extra></extra>",
        showlegend: legend && run === runs.find((other) => other.arm === run.arm),
      }));
    /* On its line, or at the top where that has left the view. */
    const noticed = (key, runs, top) => runs.filter((run) => run.lines[key]?.[0].length).map((run) => {
      const [x, y] = run.lines[key];
      const at = (step) => Math.min(top, y[Math.max(0, x.findLastIndex((one) => one <= step))]);
      const marks = run.marks.map(([step, said, kind]) => [step, [run.name, ...said], kind]);
      return signs(marks, marks.map(([step]) => at(step)), { legendgroup: `arm ${run.arm}` });
    });
    const draw = () => {
      const runs = data.runs.filter((run) =>
        (arm.at === 0 || run.arm === arm.at - 1) && (seed.at === 0 || run.seed === seed.at - 1));
      const keys = [data.quantities[0], ...(below.length ? [below[second.at]] : [])];
      const panels = keys.map(([key, label], at) => {
        const scale = growing(runs.map((run) => run.lines[key]));
        const top = scale.range ? 10 ** scale.range[1] : Infinity;
        const traces = drawn(key, runs, at === 0 && data.arms.length <= 12);
        return {
          title: label, share: at ? 2 : 3, axis: scale,
          traces: at ? traces : [...traces, ...noticed(key, runs, top)],
        };
      });
      const shown = stacked(panels, [], 520);
      return { data: shown.data, layout: { ...shown.layout, hovermode: "closest" } };
    };
    return { choosers: [arm, seed, second], draw };
  };

  const twin = (data) => {
    const quantity = choice("Quantity", data.quantities.map(([, label]) => label));
    const draw = () => {
      const [key, label] = data.quantities[quantity.at];
      const looks = [{ color: colour("--c2") }, { color: colour("--c8"), dash: "dash" }];
      const traces = data.runs.map((run, at) => curve(run.lines[key], run.name, looks[at]));
      const scale = growing(data.runs.map((run) => run.lines[key]));
      return stacked([{ title: text(label), share: 1, axis: scale, traces }], data.marks, 400);
    };
    return { choosers: [quantity], draw };
  };

  const timeline = (data) => {
    const site = choice("Product of", data.sites.map((one) => one.name), data.chosen);
    const draw = () => {
      const one = data.sites[site.at];
      const [blue, red, orange, soft] = ["--c1", "--c2", "--c5", "--soft"].map(colour);
      const some = (...lines) => lines.some((line) => line && line[0].length);
      /* Of what is not cast nothing is lost, which is no news. */
      const lossy = some(one.staleness) || [one.flushed, one.saturated].some((line) => line[1].some((y) => y > 0));
      const limit = (line) => [[line[0][0], line[0].at(-1)], [data.threshold, data.threshold]];
      const loss = { ...(data.steps.loss && { loss: data.steps.loss }),
        ...(data.steps.common_loss && { common_loss: data.steps.common_loss }) };
      const panels = [
        some(one.alignment) && {
          title: `Alignment of channel ${one.channel}${fit(": |cos(gate row, up row)|", "")}`, share: 1,
          axis: axis("", { range: [0, 1.04], nticks: 4 }),
          traces: [curve(one.alignment, `channel ${one.channel}`, { color: blue }),
            curve(one.control, "control: another up row", { color: soft, dash: "dash", width: 1 })],
        },
        some(one.amplification) && {
          title: `Amplification${fit(": what the multiplication adds to the peaks", "")}`, share: 0.9,
          axis: growing([one.amplification]),
          traces: [curve(one.amplification, "amplification", { color: blue, width: 1 })],
        },
        some(one.amax) && {
          title: `Largest product, and what ${fit("the scale in force allowed", "was allowed")}`, share: 1.3,
          axis: logarithmic(...extent(one.amax[1])),
          traces: [curve(one.amax, "amax", { color: blue, width: 1 }),
            curve(one.allowed, "allowed", { color: orange, shape: "hvh" })],
        },
        some(one.staleness) && {
          title: `Staleness${fit(": amax now / the amax that made the scale", "")}`, share: 1,
          axis: logarithmic(...extent(one.staleness[1])),
          traces: [curve(one.staleness, "staleness", { color: red, width: 1 }),
            curve(limit(one.staleness), `threshold ${data.threshold}`, { color: soft, dash: "dash", width: 1 },
              { hoverinfo: "skip", hovertemplate: null })],
        },
        lossy && {
          title: "Share of the product that the cast loses", share: 0.9,
          axis: axis("", { tickformat: "~%", nticks: 4, rangemode: "tozero" }),
          traces: [curve(one.flushed, "flushed to zero", { color: orange }, { hovertemplate: "%{y:.3~%}" }),
            curve(one.saturated, "saturated", { color: red, dash: "dash" }, { hovertemplate: "%{y:.3~%}" })],
        },
        some(data.steps.grad_norm) && {
          title: "Gradient norm", share: 0.9, axis: growing([data.steps.grad_norm]),
          traces: [curve(data.steps.grad_norm, "gradient norm", { color: colour("--ink"), width: 1 })],
        },
        some(...Object.values(loss)) && {
          title: "Loss", share: 0.9, axis: growing(Object.values(loss)),
          traces: Object.entries(loss).map(([name, line], at) =>
            curve(line, name, { color: at ? orange : colour("--ink"), width: at ? 1.6 : 1 })),
        },
      ].filter(Boolean);
      const shown = stacked(panels, data.marks, 60 + 132 * panels.length);
      shown.data.forEach((trace) => { trace.showlegend = false; });
      return shown;
    };
    return { choosers: [site], draw };
  };

  const heat = (data) => {
    const statistic = choice("Statistic", data.statistics.map((one) => one.label), data.chosen);
    const roles = () => Object.keys(data.statistics[statistic.at].roles);
    const first = Math.max(0, roles().indexOf("product"));
    const role = choice("Tensor", roles(), first);
    const refill = () => { /* not every tensor has every statistic */
      const before = role.input.selectedOptions[0].textContent;
      role.fill(roles());
      role.input.value = Math.max(0, roles().indexOf(before));
      role.element.hidden = roles().length < 2;
    };
    const draw = () => {
      const one = data.statistics[statistic.at];
      const cells = one.roles[roles()[role.at]];
      const found = cells.flat().filter(Number.isFinite);
      const values = found.length ? found : [1]; // there are but infinite ones
      const low = values.reduce((a, b) => Math.min(a, b), Infinity);
      const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
      const log = low > 0 && high / low > 50;
      const [from, to] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
      const beyond = to > from ? 0.25 * (to - from) : Math.abs(to) || 1; // where infinity is drawn
      const shade = (v) => (v === null ? null : v === "inf" ? to + beyond : v === "-inf" ? from - beyond
        : log ? Math.log10(v) : v);
      const say = (v) => ({ inf: "infinite", "-inf": "minus infinite" })[v] ?? number(v);
      const scale = DARK.matches !== one.low ? MAGMA : [...MAGMA].reverse();
      const apart = Math.ceil(Math.log10(high / low) / 5) || 1;
      const powers = Array.from({ length: 80 }, (_, at) => (at - 40) * apart);
      const every = Math.ceil(data.layers.length / 24);
      const shownLayers = data.layers.map((_, at) => at).filter((at) => at % every === 0);
      const ticks = log && Math.log10(high / low) > 1
        ? { tickvals: powers, ticktext: powers.map((k) => `10${sup(k)}`) } : {};
      const trace = {
        type: "heatmap", x: one.steps, y: data.layers.map((_, at) => at), z: cells.map((row) => row.map(shade)),
        hoverongaps: false,
        text: cells.map((row, at) => row.map((v, bin) =>
          `${text(data.layers[at])}<br>from step ${one.steps[bin]}: ${say(v)}`)),
        hovertemplate: "%{text}<extra></extra>", xgap: 0, ygap: data.layers.length > 1 ? 1 : 0,
        colorscale: scale.map((each, at) => [at / (scale.length - 1), each]),
        colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: colour("--soft"), size: 11.5 },
          tickformat: "~g", ...(log && !ticks.tickvals ? { showticklabels: false } : ticks) },
      };
      const rows = axis("", {
        tickvals: shownLayers, ticktext: shownLayers.map((at) => text(ending(data.layers[at]))),
        autorange: "reversed", automargin: true, showgrid: false,
      });
      const height = Math.min(720, Math.max(200, 96 + 26 * data.layers.length));
      const told = roles()[role.at] === "product" ? data.marks : [];
      const marks = told.map(([step, , said]) => [step, [said], "finding"]);
      const above = signs(marks, told.map(([, layer]) => layer), { cliponaxis: true });
      return {
        data: [trace, above],
        layout: layout(height, { xaxis: axis("step", { showgrid: false, tickformat: "" }), yaxis: rows }),
      };
    };
    statistic.input.addEventListener("input", refill);
    return { choosers: [statistic, role], draw };
  };

  const channels = (data) => {
    const site = choice("Layer", data.sites.map((one) => one.name), data.chosen);
    const quantity = choice("Quantity", data.quantities.map(([, label]) => label));
    const draw = () => {
      const [key, label] = data.quantities[quantity.at];
      const tracks = data.sites[site.at].tracks;
      const lines = tracks.map((track) => [track.steps, track[key]]);
      const traces = tracks.map((track, at) => {
        const look = { ...styled(at), width: at ? 1.2 : 2.8 };
        return curve(lines[at], `channel ${track.channel}`, look,
          { mode: "lines+markers", marker: { size: at ? 4 : 5, color: look.color } });
      });
      const scale = key === "alignment" ? axis("", { range: [-1.04, 1.04] }) : growing(lines);
      return stacked([{ title: label, share: 1, axis: scale, traces }], [], 400);
    };
    return { choosers: [site, quantity], draw };
  };

  const RING = "circle-open";

  const weights = (data) => {
    const place = choice("Show", data.places.map((one) => one.name));
    const all = () => data.places[place.at].scatters ?? data.places[place.at].peaks;
    const step = slider("Step", all().length, all().length - 1);
    place.input.addEventListener("input", () => step.resize(all().length));
    // `signs`: of the points that the caption speaks of, what they look like there.
    const dots = (x, y, signs, said) => ({
      type: "scatter", mode: "markers", x, y, showlegend: false, text: said,
      hovertemplate: "%{text}<extra></extra>", cliponaxis: false,
      marker: {
        color: x.map((_, at) => colour(signs[at] ? "--c2" : "--c1")), opacity: 0.8,
        symbol: x.map((_, at) => signs[at] ?? "circle"),
        size: x.map((_, at) => (signs[at] ? 14 : 7)),
        line: { width: x.map((_, at) => (signs[at] === RING ? 2.5 : 0)) },
      },
    });
    const height = () => (NARROW.matches ? 360 : 460);
    const rows = (scatters, one) => {
      step.say(`${one.step}, cosine ${number(one.alignment)}`);
      const limit = 1.08 * scatters.reduce((most, each) =>
        [...each.gate, ...each.up].reduce((a, b) => Math.max(a, Math.abs(b)), most), 0) || 1;
      const said = one.gate.map((gate, at) => `gate ${number(gate)}, up ${number(one.up[at])}${
        at === one.peak ? "<br>the largest gate × up" : ""}`);
      const square = (title, more) =>
        axis(title, { range: [-limit, limit], nticks: 7, constrain: "domain", ...more });
      return {
        data: [dots(one.gate, one.up, { [one.peak]: RING }, said)],
        layout: layout(height(), {
          xaxis: square("weight in the gate row"),
          yaxis: square("weight in the up row", { scaleanchor: "x" }),
          shapes: [1, -1].map((slope) => ({
            type: "line", x0: -limit, x1: limit, y0: -slope * limit, y1: slope * limit, layer: "below",
            line: { width: 1, dash: "dot", color: colour("--soft") },
          })),
        }),
      };
    };
    /* A channel on the dashed line has its largest gate and up in one element with the largest
       product; what lies beyond it peaks in other elements. */
    const outputs = (peaks, one) => {
      step.say(`${one.step}, largest product ${number(one.product_amax[0])}`);
      const ends = (name) => extent(peaks.flatMap((each) => each[name]));
      const said = one.channels.map((channel, at) => `channel ${channel}: product ${
        number(one.product_amax[at])}<br>gate ${number(one.gate_amax[at])}, up ${number(one.up_amax[at])}`);
      const [low, high] = ends("gate_amax").map((value, at) => (at ? 1.5 : 1 / 1.5) * value);
      const line = {
        type: "scatter", mode: "lines", x: [low, high], y: [low, high].map((gate) => one.product_amax[0] / gate),
        line: { width: 1, dash: "dash", color: colour("--soft") }, hoverinfo: "skip", showlegend: false,
      };
      const largest = one.product_amax.indexOf(Math.max(...one.product_amax));
      const titled = (scale, title) => ({ ...scale, title: axis(title).title });
      return {
        data: [line, dots(one.gate_amax, one.up_amax, { [largest]: "diamond", 0: "x" }, said)],
        layout: layout(height(), {
          xaxis: titled(logarithmic(low, high), "largest gate of a channel"),
          yaxis: titled(logarithmic(...ends("up_amax")), "largest up of a channel"),
        }),
      };
    };
    const draw = () => {
      const chosen = data.places[place.at];
      return (chosen.scatters ? rows : outputs)(all(), all()[step.at]);
    };
    return { choosers: [place, step], draw };
  };

  const grown = (values) => (values.some((y) => y > 0) ? logarithmic(...extent(values)) : axis(""));

  /* A row a layer: from the first step, hollow, to the one that is chosen. */
  const layers = (data) => {
    const step = slider("Step", data.when.length, data.chosen);
    const places = data.layers.map((_, at) => at);
    const scale = () => grown(data.runs.flatMap((run) => run.amax.flat()));
    const draw = () => {
      step.say(data.when[step.at]);
      const traces = data.runs.flatMap((run, at) => {
        const [first, now] = [run.amax[0], run.amax[step.at]];
        const [hue, symbol] = at ? ["--c8", "circle"] : ["--c2", "diamond"];
        const dots = (x, name, when, look) => ({
          type: "scatter", mode: "markers", x, y: places, name: text(name), cliponaxis: false,
          text: x.map((amax, layer) => `${text(data.layers[layer])}<br>${text(when)}: ${number(amax)}`),
          hovertemplate: "%{text}<extra></extra>", marker: { size: 10, color: colour(hue), symbol, ...look },
        });
        const between = {
          type: "scatter", mode: "lines", x: places.flatMap((layer) => [first[layer], now[layer], null]),
          y: places.flatMap((layer) => [layer, layer, null]), hoverinfo: "skip", showlegend: false,
          line: { width: 2, color: colour("--line") },
        };
        return [between, dots(first, `${run.name}, ${data.when[0]}`, data.when[0], { symbol: `${symbol}-open` }),
          dots(now, run.name, data.when[step.at])];
      });
      const every = Math.ceil(data.layers.length / 24);
      const shown = places.filter((at) => at % every === 0);
      const rows = axis("", {
        tickvals: shown, ticktext: shown.map((at) => text(ending(data.layers[at]))), automargin: true,
        range: [data.layers.length - 0.4, -0.6],
      });
      const title = { title: axis("largest magnitude of the product").title };
      return {
        data: traces,
        layout: layout(Math.min(720, 150 + 26 * data.layers.length), { xaxis: { ...scale(), ...title }, yaxis: rows }),
      };
    };
    return { choosers: [step], draw };
  };

  /* Bold the mean over an arm's runs, faint each of them. */
  const doses = (data) => {
    const quantity = choice("Quantity", data.quantities.map((one) => one.label));
    const arm = choice("Arms", ["all", ...data.arms]);
    const draw = () => {
      const one = data.quantities[quantity.at];
      const traces = one.arms.flatMap((lines, at) => {
        if (arm.at && at !== arm.at - 1) return [];
        const before = data.precise.slice(0, at).filter((each) => each === data.precise[at]).length;
        const look = data.precise[at] ? grey(before) : styled(before);
        const shared = { legendgroup: `arm ${at}`, hovertemplate: `2<sup>%{x}</sup>: %{y:.4g}` };
        const runs = lines.runs.map((line) => curve(line, data.arms[at], { ...look, width: 0.8 },
          { ...shared, opacity: 0.5, showlegend: false, hoverinfo: "skip", hovertemplate: null }));
        const bold = { ...shared, mode: "lines+markers", marker: { size: 7, color: look.color } };
        return [...runs, curve(lines.mean, data.arms[at], { ...look, width: 2.4 }, bold)];
      });
      const ticks = [...new Set(traces.flatMap((trace) => trace.x))].sort((a, b) => a - b);
      return {
        data: traces,
        layout: layout(400, {
          xaxis: axis("amplification of one channel", { tickvals: ticks, ticktext: ticks.map((k) => `2${sup(k)}`) }),
          yaxis: one.log ? grown(traces.flatMap((trace) => trace.y)) : axis(""),
        }),
      };
    };
    return { choosers: [quantity, arm], draw };
  };

  /* The lower edge of a bin of a histogram, as a power of two: see sketch.bin_edge. */
  const edge = (bin) => {
    const [value] = new Float32Array(new Uint32Array([bin << 21]).buffer);
    return Math.log2(Math.max(value, 2 ** -140));
  };

  const ranges = (data) => {
    const tensor = choice("Tensor", data.tensors.map((one) => one.name));
    const worst = () => { /* the slider starts where the scale was most stale */
      const stale = data.tensors[tensor.at].steps.map((one) => one.staleness ?? 0);
      return stale.indexOf(Math.max(...stale));
    };
    const step = slider("Step", data.tensors[0].steps.length, worst());
    tensor.input.addEventListener("input", () => {
      step.resize(data.tensors[tensor.at].steps.length);
      step.input.value = worst();
    });
    const draw = () => {
      const { steps } = data.tensors[tensor.at];
      const one = steps[step.at];
      step.say(`${one.when}, ${one.format}, staleness ${number(one.staleness)}`);
      const spans = steps.map((each) => {
        const [low, high] = [edge(each.start), edge(each.start + each.counts.length)];
        const floor = each.bounds[0] - 30; // a single tiny value would squeeze all others
        return [Math.max(floor, Math.min(low, each.bounds[0] - 5)), Math.max(high, each.bounds[2] + 3) + 0.5];
      });
      const left = Math.min(...spans.map(([low]) => low));
      const right = Math.max(...spans.map(([, high]) => high));
      const most = steps.reduce((top, each) => each.counts.reduce((a, b) => Math.max(a, b), top), 1);
      const edges = Array.from({ length: one.counts.length + 1 }, (_, at) => edge(one.start + at));
      const middles = one.counts.map((_, at) => (edges[at] + edges[at + 1]) / 2);
      const [flushed, subnormal, saturated] = one.shares;
      const zones = [["becomes 0", "--zone-lost", flushed], ["subnormal", "--zone-poor", subnormal],
        ["normal", null, null], ["saturated", "--zone-cut", saturated]];
      const borders = [left, ...one.bounds, right];
      const trace = {
        type: "bar", x: middles, y: one.counts.map((n) => n || null),
        width: one.counts.map((_, at) => edges[at + 1] - edges[at]), marker: { color: colour("--c1"), line: { width: 0 } },
        text: one.counts.map((n, at) => `2<sup>${edges[at].toFixed(2)}</sup> to 2<sup>${edges[at + 1].toFixed(2)}</sup>: ${n} elements`),
        textposition: "none", hovertemplate: "%{text}<extra></extra>", showlegend: false,
      };
      const shades = zones.map(([, shade], at) => shade && ({
        type: "rect", x0: borders[at], x1: borders[at + 1], yref: "paper", y0: 0, y1: 1, layer: "below",
        fillcolor: colour(shade), line: { width: 0 },
      })).filter(Boolean);
      const lines = one.bounds.map((bound) => ({
        type: "line", x0: bound, x1: bound, yref: "paper", y0: 0, y1: 1,
        line: { width: 1, dash: "dash", color: colour("--soft") },
      }));
      const shares = zones.map(([name, , share], at) => ({
        text: `${name}<br>${percent(share)}`, showarrow: false, yref: "paper", y: 1, yanchor: "top",
        x: (borders[at] + borders[at + 1]) / 2, font: { size: NARROW.matches ? 10.5 : 12 },
      })).filter((_, at) => borders[at + 1] - borders[at] > (right - left) / fit(14, 5));
      const apart = [1, 2, 4, 8, 16].find((octaves) => (right - left) / octaves < (NARROW.matches ? 7 : 16));
      const ticks = [];
      for (let k = Math.ceil(left / apart) * apart; k < right; k += apart) ticks.push(k);
      return {
        data: [trace],
        layout: layout(360, {
          bargap: 0, shapes: [...shades, ...lines], annotations: shares,
          xaxis: axis("magnitude of an element of the product",
            { range: [left, right], tickvals: ticks, ticktext: ticks.map((k) => `2${sup(k)}`), showgrid: false }),
          yaxis: axis("elements", { type: "log", range: [-0.15, Math.log10(most) + 1], dtick: 1 }),
        }),
      };
    };
    return { choosers: [tensor, step], draw };
  };

  /* ---- into the page ---- */

  const CHARTS = { losses, timeline, heat, channels, weights, layers, ranges, twin, doses };

  const replace = async (figure, make, data) => {
    const picture = figure.querySelector(".static");
    const { choosers, draw } = make(data);
    const plot = made("div", { className: "plot" });
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", picture.querySelector("img").alt);
    const bar = made("div", { className: "choosers" }, ...choosers.map((one) => one.element));
    bar.hidden = choosers.every((one) => one.element.hidden);
    const live = made("div", { className: "card live" }, bar, plot);
    const show = async () => {
      const shown = draw();
      /* A zoom outlives a change of colours, not one of what is shown. */
      shown.layout.uirevision = choosers.map((one) => one.at).join();
      return Plotly.react(plot, shown.data, shown.layout, CONFIG);
    };
    figure.insertBefore(live, picture);
    figure.classList.add("drawn");
    choosers.forEach((one) => one.input.addEventListener("input", show));
    [DARK, NARROW].forEach((query) => query.addEventListener("change", show));
    await show().catch((error) => {
      live.remove();
      figure.classList.remove("drawn");
      throw error;
    });
  };

  /* Scripts and data travel compressed: of plotly two fifths are left, of the data one half. */
  const unpacked = (id) => {
    const coded = atob(document.getElementById(id).textContent);
    const packed = new Uint8Array(coded.length);
    for (let at = 0; at < coded.length; at += 1) packed[at] = coded.charCodeAt(at);
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  const start = async () => {
    const [library, data] = await Promise.all([unpacked("library"), unpacked("data")]);
    document.head.append(made("script", { textContent: library }));
    const all = JSON.parse(data);
    for (const [name, make] of Object.entries(CHARTS)) {
      const figures = document.querySelectorAll(`figure[data-chart="${name}"]`);
      const data = [all[name] ?? []].flat();
      for (let at = 0; at < Math.min(figures.length, data.length); at += 1) {
        await replace(figures[at], make, data[at]).catch((error) => console.error(name, error));
        await new Promise((next) => { setTimeout(next); }); // the page stays awake between charts
      }
    }
    document.documentElement.dataset.charts = "drawn";
  };

  start();
})();
