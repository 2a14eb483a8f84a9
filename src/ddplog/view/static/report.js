(function () {
  "use strict";
  const page = JSON.parse(document.getElementById("page").textContent);
  const tip = document.getElementById("tip");
  const cards = Array.from(document.querySelectorAll(".card[data-chart]"));
  const charts = new Map();
  let xMode = "step", isLog = false;
  const modeOf = (spec) => (spec.x === "time" ? "time" : xMode);  // a sampled metric's steps are seconds
  const types = { i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function unpack(column, length) {
    if (!column) return null;
    if (!("b" in column)) return new Array(length).fill(column.c);
    const raw = Uint8Array.from(atob(column.b), (c) => c.charCodeAt(0));
    return Array.from(new types[column.t](raw.buffer), (v) => (Number.isFinite(v) ? v : null));
  }

  function format(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e7 || size < 1e-4)) return value.toExponential(4).replace(/\.?0+e/, "e");
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    return String(Number(value.toPrecision(6)));
  }

  function axisNumber(value) {
    if (value === null) return "";
    const size = Math.abs(value);
    if (size >= 1e9 || (size !== 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e");
    if (size >= 1e6) return Number((value / 1e6).toFixed(3)) + "M";
    if (size >= 1e4) return Number((value / 1e3).toFixed(3)) + "k";
    return String(Number(value.toPrecision(6)));
  }

  function duration(s) {
    if (s === null) return "";
    const sign = s < 0 ? "-" : "", t = Math.abs(s), two = (n) => String(Math.floor(n)).padStart(2, "0");
    if (t < 60) return sign + Number(t.toFixed(t < 10 ? 2 : 0)) + "s";
    if (t < 3600) return sign + Math.floor(t / 60) + ":" + two(t % 60);
    return sign + Math.floor(t / 3600) + "h" + two((t % 3600) / 60);
  }

  function load(card) {
    const spec = JSON.parse(document.getElementById("chart-" + card.dataset.chart).textContent);
    const length = spec.length, data = { spec, length };
    for (const name of Object.keys(spec.columns)) data[name] = unpack(spec.columns[name], length);
    data.lines = spec.lines.map((line) => ({ label: line.label, y: unpack(line.y, length) }));
    return data;
  }

  // Attempts that rewind make time run against the step, and uPlot wants an ascending axis.
  function ordered(data) {
    if (modeOf(data.spec) === "step" || !data.time) return data;
    const order = Array.from(data.time.keys()).sort((a, b) => data.time[a] - data.time[b]);
    const pick = (column) => column && order.map((i) => column[i]);
    const out = { spec: data.spec, length: data.length };
    for (const name of Object.keys(data.spec.columns)) out[name] = pick(data[name]);
    out.lines = data.lines.map((line) => ({ label: line.label, y: pick(line.y) }));
    return out;
  }

  function colour(index, count) {
    if (count === 1) return css("--accent");
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    return `hsl(${(215 + (index * 360) / count) % 360} 70% ${dark ? 66 : 44}%)`;
  }

  function marksOf(attempts, mode) {
    return page.marks
      .map((mark) => ({ ...mark, at: mode === "step" ? mark.step : mark.time }))
      .filter((mark) => mark.at !== null && mark.at !== undefined && (attempts || !mark.attempt));
  }

  function drawMarks(marks) {
    return (u) => {
      const ctx = u.ctx, { left, top, width, height } = u.bbox, ratio = devicePixelRatio || 1;
      ctx.save();
      ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
      ctx.lineWidth = ratio;
      ctx.font = `${11 * ratio}px system-ui, sans-serif`;
      for (const mark of marks) {
        if (mark.at < u.scales.x.min || mark.at > u.scales.x.max) continue;
        const x = Math.round(u.valToPos(mark.at, "x", true)) + 0.5;
        ctx.strokeStyle = ctx.fillStyle = css({ error: "--bad", warning: "--warn" }[mark.level] || "--info");
        ctx.globalAlpha = mark.attempt ? 0.9 : 0.55;
        ctx.setLineDash(mark.attempt ? [] : [3 * ratio, 4 * ratio]);
        ctx.beginPath(); ctx.moveTo(x, top); ctx.lineTo(x, top + height); ctx.stroke();
        if (mark.attempt) {
          const flip = x + ctx.measureText(mark.label).width + 8 * ratio > left + width;
          ctx.textAlign = flip ? "right" : "left";
          ctx.fillText(mark.label, x + (flip ? -4 : 4) * ratio, top + 11 * ratio);
        }
      }
      ctx.restore();
    };
  }

  function row(table, cells) {
    const tr = table.insertRow();
    for (const cell of cells) tr.insertCell().textContent = cell;
  }

  function fillTip(u, data, marks, shown) {
    const i = u.cursor.idx;
    tip.textContent = "";
    const head = document.createElement("b");
    const at = data.step && data.spec.x !== "time" ? "step " + data.step[i].toLocaleString("en-US") : "";
    head.textContent = [at, data.time ? duration(data.time[i]) : "", data.attempt ? "attempt " + data.attempt[i] : ""]
      .filter(Boolean).join(" · ");
    const table = document.createElement("table");
    const rank = (column) => (column && column[i] !== null && column[i] >= 0 ? "rank " + column[i] : "");
    if (data.spec.kind === "lines") {
      const all = shown.map((line) => [line.label, line.y[i]]).filter((pair) => pair[1] !== null);
      all.sort((a, b) => b[1] - a[1]);
      for (const [label, value] of all.slice(0, 8)) row(table, [label, format(value) + data.spec.unit, ""]);
      if (all.length > 8) row(table, [`${all.length - 8} more`, "", ""]);
    } else {
      row(table, [data.spec.value_label, format(data.value[i]) + data.spec.unit, ""]);
      if (data.mean) row(table, ["mean over ranks", format(data.mean[i]), ""]);
      if (data.low) {
        row(table, ["max", format(data.high[i]) + data.spec.unit, rank(data.max_rank)]);
        row(table, ["min", format(data.low[i]) + data.spec.unit, rank(data.min_rank)]);
      } else if (data.n && data.n[i] === 1) row(table, ["from", rank(data.min_rank), ""]);
      if (data.n) row(table, ["ranks", `${data.n[i]} / ${data.expected[i]}`, data.n[i] < data.expected[i] ? "missing" : ""]);
      if (data.bad && data.bad[i]) row(table, ["NaN or Inf", String(data.bad[i]), rank(data.bad_rank)]);
    }
    tip.append(head, table);
    for (const mark of marks) {
      if (Math.abs(u.valToPos(mark.at, "x") - u.cursor.left) > 5) continue;
      const p = document.createElement("p");
      p.textContent = mark.text;
      p.className = { error: "bad", warning: "warn" }[mark.level] || "";
      tip.append(p);
    }
  }

  function placeTip(u) {
    const box = u.over.getBoundingClientRect();
    tip.style.display = "block";
    let x = box.left + u.cursor.left + 16, y = box.top + u.cursor.top + 16;
    if (x + tip.offsetWidth > innerWidth - 8) x = box.left + u.cursor.left - tip.offsetWidth - 16;
    if (y + tip.offsetHeight > innerHeight - 8) y = innerHeight - tip.offsetHeight - 8;
    tip.style.left = Math.max(4, x) + "px";
    tip.style.top = Math.max(4, y) + "px";
  }

  function build(card) {
    const plot = card.querySelector(".plot");
    const old = charts.get(card);
    if (old && old.chart) old.chart.destroy();
    plot.textContent = "";
    const raw = old ? old.raw : load(card), data = ordered(raw), spec = data.spec;
    const showsMean = card.dataset.line === "mean" && data.mean;
    const mode = modeOf(spec);
    const x = mode === "time" && data.time ? data.time : data.step;
    const series = [{}], columns = [x];
    let bands;
    const hasBand = data.low && (spec.band_fits || showsMean);
    if (hasBand) {
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      series.push({ ...edge }, { ...edge });
      columns.push(data.high, data.low);
      bands = [{ series: [1, 2], fill: css("--band") }];
    }
    let shown;
    if (spec.kind === "lines") {
      shown = data.lines;
      shown.forEach((line, i) => {
        series.push({ label: line.label, stroke: colour(i, shown.length), width: 1.4, spanGaps: true, points: { show: false } });
        columns.push(line.y);
      });
    } else {
      const y = showsMean ? data.mean : data.value;
      shown = [{ label: "value", y }, ...data.lines];
      series.push({ label: "value", stroke: css("--accent"), width: x.length > 500 ? 1.1 : 1.7, points: { show: x.length < 60, size: 5 } });
      columns.push(y);
      data.lines.forEach((line, i) => {
        series.push({ label: line.label, stroke: colour(i + 1, data.lines.length + 2), width: 1.1, spanGaps: true, points: { show: false } });
        columns.push(line.y);
      });
    }
    const legend = card.querySelector(".keys");
    if (legend) {
      legend.textContent = "";
      series.slice(hasBand ? 3 : 1).forEach((one, i) => {
        const item = document.createElement("span"), swatch = document.createElement("i");
        swatch.style.background = one.stroke;
        item.append(swatch, spec.kind !== "lines" && i === 0 ? spec.value_label : one.label);
        legend.append(item);
      });
    }
    if (!columns.slice(1).some((column) => column.some((v) => v !== null))) {
      const empty = document.createElement("div");
      empty.className = "empty";
      empty.textContent = "no finite value";
      plot.append(empty);
      charts.set(card, { raw, chart: null });
      return;
    }
    const positive = columns.slice(1).every((column) => column.every((v) => v === null || v > 0));
    const marks = marksOf(page.num_attempts > 1, mode);
    const axis = { stroke: css("--muted"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1, size: 5 },
      font: "11px system-ui, sans-serif" };
    const chart = new uPlot({
      width: plot.clientWidth, height: plot.clientHeight, series, bands, legend: { show: false },
      cursor: { sync: { key: "run-" + mode, scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 6 },
        focus: { prox: spec.kind === "lines" ? 24 : -1 } },
      focus: { alpha: 0.35 },
      scales: { x: { time: false }, y: isLog && positive ? { distr: 3 } : {} },
      axes: [
        { ...axis, size: 28, gap: 3, space: 64, values: (u, ticks) => ticks.map(mode === "time" ? duration : axisNumber) },
        { ...axis, size: 58, gap: 4, values: (u, ticks) => ticks.map(axisNumber) },
      ],
      hooks: {
        draw: [drawMarks(marks)],
        setCursor: [(u) => {
          if (!u.over.matches(":hover")) return;
          if (u.cursor.idx === null || u.cursor.idx === undefined || u.cursor.left < 0) { tip.style.display = "none"; return; }
          fillTip(u, data, marks, shown);
          placeTip(u);
        }],
      },
    }, columns, plot);
    chart.over.addEventListener("mouseleave", () => { tip.style.display = "none"; });
    charts.set(card, { raw, chart });
  }

  const rebuild = () => { for (const card of Array.from(charts.keys())) build(card); };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !charts.has(entry.target)) build(entry.target);
  }, { rootMargin: "400px 0px" });
  const sized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const known = charts.get(entry.target.closest(".card"));
      if (known && known.chart && entry.contentRect.width > 0)
        known.chart.setSize({ width: Math.floor(entry.contentRect.width), height: entry.target.clientHeight });
    }
  });
  for (const card of cards) {
    const box = card.getBoundingClientRect();
    if (box.top < innerHeight + 400 && box.bottom > -400) build(card);
    seen.observe(card);
    sized.observe(card.querySelector(".plot"));
    for (const button of card.querySelectorAll("button[data-line]"))
      button.addEventListener("click", () => {
        card.dataset.line = button.dataset.line;
        for (const other of card.querySelectorAll("button[data-line]")) other.setAttribute("aria-pressed", other === button);
        build(card);
      });
  }
  for (const button of document.querySelectorAll("button[data-x]"))
    button.addEventListener("click", () => {
      xMode = button.dataset.x;
      for (const other of document.querySelectorAll("button[data-x]")) other.setAttribute("aria-pressed", other === button);
      rebuild();
    });
  document.getElementById("log").addEventListener("change", (event) => { isLog = event.target.checked; rebuild(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);

  const filter = document.getElementById("filter"), none = document.getElementById("none");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const group of document.querySelectorAll("details.group")) {
      let shown = 0;
      for (const card of group.querySelectorAll(".card")) {
        const key = card.dataset.key.toLowerCase();
        card.hidden = !words.every((word) => key.includes(word));
        shown += !card.hidden;
      }
      group.hidden = !shown;
      left += shown;
    }
    if (none) none.hidden = left > 0;
  });
})();
