"use strict";
(() => {
  // Theme: the system's, unless the button has been pressed.
  const root = document.documentElement;
  const remembered = {
    get() { try { return localStorage.getItem("pliant-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("pliant-theme", value); } catch { /* storage is switched off */ } },
  };
  const chosen = remembered.get();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = getComputedStyle(root).colorScheme === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
    remembered.set(root.dataset.theme);
    redrawAll();
  });

  // Sections.
  const links = [...document.querySelectorAll("nav button")];
  for (const link of links) {
    link.addEventListener("click", () => {
      const part = document.getElementById(link.dataset.to);
      part.scrollIntoView();
      part.focus({ preventScroll: true });
    });
  }
  if (links.length) {
    const seen = new Map(links.map(link => [document.getElementById(link.dataset.to), link]));
    const observer = new IntersectionObserver(entries => {
      for (const { target, isIntersecting } of entries) seen.get(target).setAttribute("aria-current", String(isIntersecting));
    }, { rootMargin: "-80px 0px -70% 0px" });
    for (const part of seen.keys()) observer.observe(part);
  }

  // Numbers as people read them.
  function told(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e4 && size < 1e15) return Math.round(value).toLocaleString("en-US");
    if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(4)));
  }
  function tickText(value) {
    const size = Math.abs(value);
    if (size >= 1e9) return `${Number((value / 1e9).toPrecision(3))}G`;
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    return String(Number(value.toPrecision(4)));
  }
  function ticks(low, high, count, isLog, isWhole = false) {
    if (isLog) {
      const found = [];
      const few = Math.log10(high / low) < 2.2 ? [1, 2, 5] : [1];
      const every = Math.max(1, Math.ceil(Math.log10(high / low) / count));
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every) {
        for (const digit of few) found.push(digit * 10 ** power);
      }
      const within = found.filter(value => value >= low * 0.999 && value <= high * 1.001);
      if (within.length > 1) return within;
    }
    const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
    const sizes = [1, 2, 5, 10].map(digit => digit * unit).filter(size => !isWhole || size >= 1);
    const step = sizes.find(size => size >= raw * 0.8) ?? (isWhole ? 1 : raw);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
    return found;
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.data = JSON.parse(figure.dataset.chart);
      this.plot = figure.querySelector(".plot");
      this.svg = figure.querySelector("svg");
      this.tip = figure.querySelector(".tip");
      this.hidden = new Set();
      this.at = null;
      this.logX = this.data.logX;
      this.logY = this.data.logY;
      if (this.data.kind === "line") {
        this.data.series.forEach(series => {
          const order = series.x.map((_, index) => index).sort((a, b) => series.x[a] - series.x[b]);
          series.x = order.map(index => series.x[index]);
          series.y = order.map(index => series.y[index]);
        });
      }
      this.addTools();
      this.addLegend();
      this.addValues();
      this.listen();
      new ResizeObserver(() => this.draw()).observe(this.plot);
    }

    get shown() { return this.data.series.filter((_, index) => !this.hidden.has(index)); }

    colour(series) {
      if (!this.data.ramp) return `var(--c${series.colour % 8})`;
      const share = this.data.series.indexOf(series) / Math.max(1, this.data.series.length - 1);
      const [from, to, part] = share < 0.5 ? ["a", "b", share * 2] : ["b", "c", share * 2 - 1];
      return `color-mix(in oklab, var(--ramp-${to}) ${Math.round(part * 100)}%, var(--ramp-${from}))`;
    }

    addTools() {
      if (this.data.kind === "intervals") return;
      const tools = this.figure.querySelector(".tools");
      const positive = axis => this.data.series.every(series => series[axis].every(value => value === null || value > 0));
      if (!positive("y")) this.logY = false;
      if (!positive("x")) this.logX = false;
      if (!positive("y")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "log";
      button.title = "Logarithmic vertical axis";
      button.setAttribute("aria-pressed", String(this.logY));
      button.addEventListener("click", () => {
        this.logY = !this.logY;
        button.setAttribute("aria-pressed", String(this.logY));
        this.draw();
      });
      tools.append(button);
    }

    addLegend() {
      const legend = this.figure.querySelector(".keys");
      const { series, ramp, kind } = this.data;
      if (ramp) {
        const from = document.createElement("span"), bar = document.createElement("i"), to = document.createElement("span");
        bar.className = "ramp";
        from.textContent = series[0].name;
        to.textContent = series[series.length - 1].name;
        legend.append(from, bar, to);
        return;
      }
      if (series.length < 2) return;
      series.forEach((entry, index) => {
        const button = document.createElement("button"), mark = document.createElement("i");
        button.type = "button";
        button.setAttribute("aria-pressed", "true");
        if (kind === "line") {
          mark.style.borderColor = this.colour(entry);
          if (entry.dashed) mark.className = "dashed";
        } else {
          mark.className = "dot";
          mark.style.background = this.colour(entry);
        }
        button.append(mark, entry.name);
        button.addEventListener("click", () => {
          if (this.hidden.has(index)) this.hidden.delete(index);
          else this.hidden.add(index);
          button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
          this.leave();
          this.draw();
        });
        legend.append(button);
      });
    }

    addValues() {
      const details = this.figure.querySelector("details");
      details.addEventListener("toggle", () => {
        const host = details.querySelector(".scroll");
        if (!details.open || host.firstChild) return;
        const named = this.data.series.some(series => series.labels);
        const rows = new Map();
        this.data.series.forEach((series, column) => series.x.forEach((x, index) => {
          const key = named ? `${series.labels ? series.labels[index] : ""}` : x;
          if (!rows.has(key)) rows.set(key, []);
          const known = series.y[index];
          const interval = series.low && series.low[index] !== null
            ? ` [${told(series.low[index])}, ${told(series.high[index])}]` : "";
          rows.get(key)[column] = this.data.kind === "scatter"
            ? `${told(x)}; ${told(known)}` : (this.data.kind === "intervals" ? told(x) : told(known)) + interval;
        }));
        const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
        const headings = [named ? "" : this.data.x, ...this.data.series.map(series => series.name)];
        for (const name of headings) {
          const cell = document.createElement("th");
          cell.scope = "col";
          cell.textContent = name;
          head.append(cell);
        }
        const keys = [...rows.keys()];
        if (!named) keys.sort((a, b) => a - b);
        for (const key of keys) {
          const row = body.insertRow(), name = document.createElement("th");
          name.scope = "row";
          name.textContent = named ? key : told(key);
          row.append(name);
          this.data.series.forEach((_, column) => { row.insertCell().textContent = rows.get(key)[column] ?? ""; });
        }
        host.append(table);
      });
    }

    add(tag, attributes, parent = this.svg, text = null) {
      const node = document.createElementNS(this.svg.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) {
        if (name === "style") node.style.cssText = value;
        else node.setAttribute(name, value);
      }
      if (text !== null) node.textContent = text;
      parent.append(node);
      return node;
    }

    range(axis, isLog) {
      let values = this.shown.flatMap(series => [...series[axis], ...(axis === this.whiskers ? [...(series.low ?? []), ...(series.high ?? [])] : [])])
        .filter(value => value !== null && (!isLog || value > 0));
      if (!values.length) values = [isLog ? 1 : 0, isLog ? 10 : 1];
      const reference = this.data.reference;
      if (reference && axis === this.whiskers && (!isLog || reference[0] > 0)) values.push(reference[0]);
      let low = Infinity, high = -Infinity;
      for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
      if (this.data.zero && axis === "y" && !isLog) low = Math.min(low, 0);
      if (isLog && low === high) return [low / 2, high * 2];
      if (isLog) return this.data.kind === "line" ? [low, high] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
      if (low === high) { const pad = Math.abs(low) * 0.1 || 1; return [low - pad, high + pad]; }
      const pad = (high - low) * (axis === "x" && this.data.kind === "line" ? 0 : 0.06);
      const floor = low >= 0 && low - pad < 0 ? 0 : low - pad;
      return [floor, high + pad];
    }

    isWhole(axis) { return this.shown.every(series => series[axis].every(value => value === null || Number.isInteger(value))); }

    get whiskers() { return this.data.kind === "intervals" ? "x" : "y"; }

    draw() {
      this.width = this.plot.clientWidth;
      if (!this.width) return;
      this.svg.replaceChildren();
      if (this.data.kind === "intervals") this.drawIntervals();
      else this.drawAxes();
    }

    drawAxes() {
      const width = this.width, height = Math.round(Math.min(320, Math.max(210, width * 0.5)));
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.style.height = `${height}px`;
      const [lowX, highX] = this.range("x", this.logX), [lowY, highY] = this.range("y", this.logY);
      const marksY = ticks(lowY, highY, 5, this.logY, this.isWhole("y"));
      const left = 14 + 6.5 * Math.max(2, ...marksY.map(value => tickText(value).length)), top = 20, right = 12, bottom = 36;
      this.box = { left, top, right: width - right, bottom: height - bottom };
      const scale = (low, high, from, to, isLog) => value => isLog
        ? from + (to - from) * Math.log(value / low) / Math.log(high / low) : from + (to - from) * (value - low) / (high - low);
      this.px = scale(lowX, highX, left, width - right, this.logX);
      this.py = scale(lowY, highY, height - bottom, top, this.logY);
      for (const value of marksY) {
        const y = this.py(value);
        this.add("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y });
        this.add("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, this.svg, tickText(value));
      }
      let last = -Infinity;
      const few = this.logX && this.data.kind === "line" ? [...new Set(this.shown.flatMap(series => series.x))].sort((a, b) => a - b) : [];
      const marksX = few.length && few.length <= 12 ? few
        : ticks(lowX, highX, Math.max(2, Math.floor(width / 90)), this.logX, this.isWhole("x"));
      for (const value of marksX) {
        const x = this.px(value);
        if (x - last < 30) continue;
        last = x;
        this.add("line", { class: "grid", x1: x, x2: x, y1: height - bottom, y2: height - bottom + 4 });
        this.add("text", { x, y: height - bottom + 16, "text-anchor": "middle" }, this.svg, tickText(value));
      }
      this.add("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, this.svg, this.data.x);
      this.add("text", { x: 0, y: 9 }, this.svg, this.data.y);
      if (this.data.reference && (!this.logY || this.data.reference[0] > 0)) {
        const [value, name] = this.data.reference, y = this.py(value);
        this.add("line", { class: "rule", x1: left, x2: width - right, y1: y, y2: y });
        this.add("text", { x: left + 4, y: y - 5 }, this.svg, name);
      }
      this.named = [];
      this.lines = this.shown.map(series => (this.data.kind === "line" ? this.drawLine(series) : this.drawPoints(series)));
      this.cross = this.add("g", {});
      if (this.at !== null) this.show(this.at);
    }

    drawLine(series) {
      const group = this.add("g", {}), colour = this.colour(series);
      let path = "", isDrawing = false;
      const points = [];
      series.x.forEach((x, index) => {
        const y = series.y[index];
        if (y === null || (this.logY && y <= 0) || (this.logX && x <= 0)) { isDrawing = false; return; }
        path += `${isDrawing ? "L" : "M"}${this.px(x).toFixed(1)} ${this.py(y).toFixed(1)}`;
        isDrawing = true;
        points.push([x, y]);
      });
      const dash = series.dashed ? "stroke-dasharray:5 5;" : "";
      this.add("path", { d: path, style: `stroke:${colour};${dash}${this.data.ramp ? "stroke-width:1.5" : ""}` }, group);
      if (points.length <= 12 && !this.data.ramp) {
        for (const [x, y] of points) this.add("circle", { cx: this.px(x), cy: this.py(y), r: 3, style: `fill:${colour}` }, group);
      }
      return group;
    }

    drawPoints(series) {
      const group = this.add("g", {}), colour = this.colour(series);
      series.x.forEach((x, index) => {
        const y = series.y[index];
        if (y === null || (this.logX && x <= 0) || (this.logY && y <= 0)) return;
        const cx = this.px(x), cy = this.py(y);
        if (series.low && series.low[index] !== null) {
          this.add("line", { x1: cx, x2: cx, y1: this.py(series.low[index]), y2: this.py(series.high[index]),
            style: `stroke:${colour};stroke-width:1.5` }, group);
        }
        this.add("circle", { cx, cy, r: 5, style: `fill:${colour}` }, group);
        if (series.labels && this.width > 420) {
          const isLate = cx > this.width * 0.7, long = 10 + 6.5 * series.labels[index].length;
          const box = { from: isLate ? cx - long : cx, to: isLate ? cx : cx + long, y: cy };
          const meets = other => box.from < other.to && other.from < box.to && Math.abs(box.y - other.y) < 13;
          if (this.named.some(meets)) return;  // a tap tells the name
          this.named.push(box);
          this.add("text", { class: "name", x: cx + (isLate ? -9 : 9), y: cy + 4, "text-anchor": isLate ? "end" : "start" },
            group, series.labels[index]);
        }
      });
      return group;
    }

    drawIntervals() {
      const rows = this.shown.flatMap(series => series.x.map((value, index) => ({ series, value, name: series.labels[index],
        low: series.low?.[index] ?? null, high: series.high?.[index] ?? null })));
      const width = this.width, isNarrow = width < 520, row = isNarrow ? 40 : 28, bottom = 36, top = 6;
      const height = top + rows.length * row + bottom;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.style.height = `${height}px`;
      const [low, high] = this.range("x", false);
      const longest = Math.max(...rows.map(entry => entry.name.length), 0);
      const left = isNarrow ? 10 : Math.min(width * 0.4, 14 + 6.6 * longest), right = width - 14;
      this.px = value => left + (right - left) * (value - low) / (high - low);
      for (const value of ticks(low, high, Math.max(2, Math.floor(width / 110)), false)) {
        const x = this.px(value);
        this.add("line", { class: "grid", x1: x, x2: x, y1: top, y2: height - bottom });
        this.add("text", { x, y: height - bottom + 15, "text-anchor": "middle" }, this.svg, tickText(value));
      }
      if (this.data.reference) {
        const x = this.px(this.data.reference[0]);
        this.add("line", { class: "rule", x1: x, x2: x, y1: top, y2: height - bottom });
      }
      this.add("text", { x: (left + right) / 2, y: height - 3, "text-anchor": "middle" }, this.svg, this.data.x);
      this.rows = rows.map((entry, index) => {
        const y = top + index * row + (isNarrow ? 27 : row / 2), colour = this.colour(entry.series);
        this.add("text", isNarrow ? { class: "name", x: 0, y: y - 12 } : { class: "name", x: left - 10, y: y + 4, "text-anchor": "end" },
          this.svg, entry.name.length > 44 ? `${entry.name.slice(0, 43)}…` : entry.name);
        if (entry.low !== null && entry.high !== null) {
          this.add("line", { x1: this.px(entry.low), x2: this.px(entry.high), y1: y, y2: y,
            style: `stroke:${colour};stroke-width:2.5;stroke-linecap:round;opacity:.55` });
        }
        if (entry.value !== null) this.add("circle", { cx: this.px(entry.value), cy: y, r: 5, style: `fill:${colour}` });
        return { ...entry, y };
      });
      this.cross = this.add("g", {});
    }

    listen() {
      const point = event => {
        const box = this.plot.getBoundingClientRect();
        this.find(event.clientX - box.left, event.clientY - box.top);
      };
      this.plot.addEventListener("pointermove", point);
      this.plot.addEventListener("pointerdown", point);
      this.plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") this.leave(); });
      this.plot.addEventListener("blur", () => this.leave());
      this.plot.addEventListener("keydown", event => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") this.leave();
        if (!step || !this.stops().length) return;
        event.preventDefault();
        const stops = this.stops();
        const now = this.at === null ? (step > 0 ? -1 : stops.length) : this.at;
        this.show(Math.min(stops.length - 1, Math.max(0, now + step)));
      });
    }

    // The places that the pointer or the keys can be at.
    stops() {
      if (this.data.kind === "intervals") return this.rows ?? [];
      if (this.data.kind === "scatter" || this.data.ramp) {
        return this.shown.flatMap(series => series.x.map((x, index) => ({ series, x, y: series.y[index], index })))
          .filter(stop => stop.y !== null);
      }
      return [...new Set(this.shown.flatMap(series => series.x.filter((_, index) => series.y[index] !== null)))]
        .sort((a, b) => a - b).map(x => ({ x }));
    }

    find(x, y) {
      let best = null, nearest = Infinity;
      this.stops().forEach((stop, index) => {
        const away = this.data.kind === "intervals" ? Math.abs(stop.y - y)
          : stop.series ? Math.hypot(this.px(stop.x) - x, this.py(stop.y) - y) : Math.abs(this.px(stop.x) - x);
        if (away < nearest) { nearest = away; best = index; }
      });
      if (best !== null) this.show(best);
    }

    show(index) {
      const stop = this.stops()[index];
      if (!stop) { this.leave(); return; }
      this.at = index;
      this.cross.replaceChildren();
      const lines = [];
      let x, y;
      if (this.data.kind === "intervals") {
        [x, y] = [this.px(stop.value ?? 0), stop.y];
        const spread = stop.low === null ? "" : ` [${told(stop.low)}, ${told(stop.high)}]`;
        lines.push([stop.series, stop.name, told(stop.value) + spread]);
        this.add("circle", { cx: x, cy: y, r: 8, style: "fill:none;stroke:var(--ink);stroke-width:1.5" }, this.cross);
      } else if (stop.series) {
        [x, y] = [this.px(stop.x), this.py(stop.y)];
        const name = stop.series.labels ? stop.series.labels[stop.index] : stop.series.name;
        lines.push([null, this.data.x, told(stop.x)], [stop.series, name, told(stop.y)]);
        if (stop.series.low && stop.series.low[stop.index] !== null) {
          lines.push([null, "interval", `${told(stop.series.low[stop.index])} to ${told(stop.series.high[stop.index])}`]);
        }
        this.add("circle", { cx: x, cy: y, r: 6, style: "fill:none;stroke:var(--ink);stroke-width:1.5" }, this.cross);
        if (this.data.ramp) this.lines.forEach((line, order) => line.classList.toggle("faint", this.shown[order] !== stop.series));
      } else {
        x = this.px(stop.x);
        y = this.box.top;
        this.add("line", { class: "cross", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }, this.cross);
        lines.push([null, this.data.x, told(stop.x)]);
        for (const series of this.shown) {
          const value = series.y[series.x.indexOf(stop.x)];
          if (value === undefined || value === null) continue;
          lines.push([series, series.name, told(value)]);
          this.add("circle", { cx: x, cy: this.py(value), r: 4.5, style: `fill:${this.colour(series)};stroke:var(--paper);stroke-width:1.5` }, this.cross);
        }
      }
      this.tip.replaceChildren(...lines.map(([series, name, value]) => {
        const line = document.createElement("div"), label = document.createElement("span"), number = document.createElement("span");
        if (series) {
          const mark = document.createElement("i");
          mark.style.background = this.colour(series);
          line.append(mark);
        }
        label.textContent = name;
        number.textContent = value;
        line.append(label, number);
        return line;
      }));
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, high = this.tip.offsetHeight;
      const beside = x + 14 + wide > this.width ? x - 14 - wide : x + 14;
      this.tip.style.left = `${Math.max(0, Math.min(beside, this.width - wide))}px`;
      this.tip.style.top = `${Math.max(-8, Math.min(y - high / 2, this.plot.clientHeight - high))}px`;
    }

    leave() {
      this.at = null;
      this.tip.hidden = true;
      this.cross?.replaceChildren();
      this.lines?.forEach(line => line.classList.remove("faint"));
    }
  }
  const charts = [...document.querySelectorAll("figure.chart")].map(figure => new Chart(figure));
  function redrawAll() { for (const chart of charts) chart.draw(); }

  // Tables.
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
      const isNumber = heading.classList.contains("number");
      const next = heading.ariaSort === "none" ? (isNumber ? "descending" : "ascending")
        : heading.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of headings) other.ariaSort = "none";
      heading.ariaSort = next;
      const sign = next === "ascending" ? 1 : -1;
      const key = row => {
        const cell = row.cells[column];
        if (!isNumber) return cell.textContent;
        return cell.dataset.value === undefined || cell.dataset.value === "" ? null : Number(cell.dataset.value);
      };
      const compare = (a, b) => {
        const [left, right] = [key(a), key(b)];
        if (left === null || right === null) return (left === null) - (right === null);
        return sign * (isNumber ? left - right : left.localeCompare(right, "en", { numeric: true }));
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    }));
  }

  // Heat maps: a cell that is pointed at, tapped or reached by key says what it is.
  for (const map of document.querySelectorAll(".map")) {
    const output = map.closest(".heat").querySelector("output"), body = map.querySelector("tbody");
    let at = null;
    const tell = cell => {
      at?.classList.remove("at");
      at = cell;
      at.classList.add("at");
      const line = document.createElement("span");
      line.className = "told";
      line.textContent = cell.title;
      output.replaceChildren(line);
      if (!cell.dataset.more) return;
      const list = document.createElement("dl");
      for (const [name, text] of cell.dataset.more.split("\n").map(line => line.split("\t"))) {
        const term = document.createElement("dt"), description = document.createElement("dd");
        term.textContent = name;
        description.textContent = text;
        list.append(term, description);
      }
      output.append(list);
    };
    body.addEventListener("click", event => {
      const cell = event.target.closest("td");
      if (cell) tell(cell);
    });
    map.addEventListener("keydown", event => {
      const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!move) return;
      event.preventDefault();
      const row = at ? at.parentElement.rowIndex - 1 + move[0] : 0, column = at ? at.cellIndex + move[1] : 1;
      const cell = body.rows[row]?.cells[column];
      if (!cell || cell.tagName !== "TD") return;
      tell(cell);
      cell.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
    });
  }
})();
