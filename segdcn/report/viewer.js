"use strict";
// The two interactive parts of the page: the sliders over the images, and the viewer of sampling points.

// --- sliders: what is left of the cut is one layer of an image, what is right of it another --------------------------

for (const gallery of document.querySelectorAll(".gallery")) {
  const choose = (side) => {
    const layer = gallery.querySelector(`input[data-side="${side}"]:checked`).value;
    for (const figure of gallery.querySelectorAll(".compare")) {
      const source = figure.querySelector(`.layers [data-layer="${layer}"]`);
      const shown = figure.querySelector(`.shown-${side}`);
      shown.src = source.src;
      shown.alt = source.alt;
    }
  };
  for (const input of gallery.querySelectorAll("input[data-side]")) {
    input.addEventListener("change", () => choose(input.dataset.side));
  }
  for (const range of gallery.querySelectorAll(".compare input[type=range]")) {
    const cut = () => {
      range.parentElement.style.setProperty("--cut", `${range.value}%`);
      range.setAttribute("aria-valuetext", `${range.value} % of the width is the left picture`);
    };
    range.addEventListener("input", cut);
    cut();
  }
  choose("left");
  choose("right");
}

// --- viewer: a pixel is followed through the kernel taps of the last layers ------------------------------------------

const f32 = Math.fround; // the coordinates are those of segdcn.analysis.trace, which computes in float32

function roundHalfEven(value) {
  const down = Math.floor(value);
  const rest = value - down;
  if (rest !== 0.5) return Math.round(value);
  return down % 2 === 0 ? down : down + 1;
}

// A coordinate on a map of another size; a pixel's centre has the integer coordinate.
function rescale(value, oldSize, newSize) {
  return f32(f32(f32(value + 0.5) * f32(newSize / oldSize)) - 0.5);
}

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

// Where a cell of a layer's output map samples its input map, [y, x] for each kernel point.
function tapsOf(layer, row, column) {
  const [kernelHeight, kernelWidth] = layer.kernel;
  const [height, width] = layer.output;
  const taps = [];
  for (let k = 0; k < kernelHeight * kernelWidth; k++) {
    if (layer.taps) {
      const at = (axis) => layer.taps[((2 * k + axis) * height + row) * width + column];
      taps.push([at(0), at(1)]);
    } else {
      const y = row * layer.stride[0] - layer.padding[0] + Math.floor(k / kernelWidth) * layer.dilation[0];
      const x = column * layer.stride[1] - layer.padding[1] + (k % kernelWidth) * layer.dilation[1];
      taps.push([y, x]);
    }
  }
  return taps;
}

// The points [y, x] in image pixels after each layer, last layer first. A point outside the map samples nothing: it
// stays as one point and is not expanded further.
function trace(layers, pixel, imageSize) {
  const result = [];
  let points = [pixel.map((value, axis) => roundHalfEven(rescale(value, imageSize[axis], layers[0].output[axis])))];
  for (const layer of layers) {
    const inside = [];
    const outside = [];
    for (const [y, x] of points) {
      const row = roundHalfEven(y);
      const column = roundHalfEven(x);
      if (row >= 0 && column >= 0 && row < layer.output[0] && column < layer.output[1]) {
        inside.push(...tapsOf(layer, row, column));
      } else {
        outside.push([y, x].map((value, axis) => rescale(value, layer.output[axis], layer.input[axis])));
      }
    }
    points = inside.concat(outside);
    result.push(points.map((point) => point.map((value, axis) => rescale(value, layer.input[axis], imageSize[axis]))));
  }
  return result;
}

function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("an embedded image cannot be decoded"));
    image.src = url;
  });
}

function pixelsOf(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

const DEPTH_COLOURS = ["#ffd84a", "#ffffff", "#ff4b55"]; // nearest to the unit first; style.css has the same
const DEPTH_RADII = [0.011, 0.0062, 0.0042]; // of the width
const FIELD_COLOURS = [[72, 40, 140], [42, 120, 142], [60, 188, 117], [220, 226, 60]]; // viridis, by its strength

function fieldColour(strength) {
  const place = strength * (FIELD_COLOURS.length - 1);
  const first = Math.min(Math.floor(place), FIELD_COLOURS.length - 2);
  return FIELD_COLOURS[first].map((low, i) => low + (place - first) * (FIELD_COLOURS[first + 1][i] - low));
}

async function startViewer(root) {
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  for (const image of data.images) {
    for (const network of image.networks) {
      for (const layer of network.layers) layer.taps = layer.taps && decode(layer.taps);
    }
  }
  const panes = [...root.querySelectorAll(".pane")];
  const canvases = panes.map((pane) => pane.querySelector("canvas"));
  const control = (name) => root.querySelector(`[data-control="${name}"]`);
  const state = { image: 0, pixel: [0, 0], depth: 3, shownNetworks: data.panes };
  let pictures; // of the image that is shown: photo, truth, and of each network prediction and fields

  async function show(number) {
    const image = data.images[number];
    const load = (url) => (url ? loadImage(url) : null);
    const networks = await Promise.all(
      image.networks.map(async (network) => ({
        prediction: await load(network.prediction),
        fields: network.fields && pixelsOf(await loadImage(network.fields.url)),
      })),
    );
    const truth = await load(image.truth);
    pictures = { photo: await load(image.photo), truth: truth && pixelsOf(truth), networks };
    for (const network of networks) network.classes = network.prediction && pixelsOf(network.prediction);
    state.image = number;
    state.pixel = [...image.start];
    for (const [i, button] of [...root.querySelectorAll(".thumbs button")].entries()) {
      button.setAttribute("aria-pressed", String(i === number));
    }
    for (const canvas of canvases) canvas.style.aspectRatio = `${image.width} / ${image.height}`;
    draw();
  }

  // The name of the class whose colour a label picture has over the pixel.
  function classAt(labels) {
    const image = data.images[state.image];
    const row = Math.floor(((state.pixel[0] + 0.5) * labels.height) / image.height);
    const column = Math.floor(((state.pixel[1] + 0.5) * labels.width) / image.width);
    const colour = labels.data.subarray(4 * (row * labels.width + column), 4 * (row * labels.width + column) + 3);
    const found = data.palette.findIndex((one) => one.every((value, i) => value === colour[i]));
    return found < 0 ? "not labelled" : data.classes[found];
  }

  function nearestField(fields) {
    const distance = ([row, column]) => (row - state.pixel[0]) ** 2 + (column - state.pixel[1]) ** 2;
    return fields.pixels.reduce((best, one, i) => (distance(one) < distance(fields.pixels[best]) ? i : best), 0);
  }

  function drawField(context, canvas, fields, atlas, number) {
    const [height, width] = fields.tile;
    const top = Math.floor(number / fields.columns) * height;
    const left = (number % fields.columns) * width;
    const tile = new ImageData(width, height);
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const strength = atlas.data[4 * ((top + row) * atlas.width + left + column)] / 255;
        tile.data.set([...fieldColour(strength), 255 * Math.min(0.92, 1.3 * strength)], 4 * (row * width + column));
      }
    }
    const small = document.createElement("canvas");
    small.width = width;
    small.height = height;
    small.getContext("2d").putImageData(tile, 0, 0);
    context.imageSmoothingEnabled = true;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }

  function drawPane(pane, canvas, network) {
    const image = data.images[state.image];
    const shown = image.networks[network];
    const loaded = pictures.networks[network];
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round((canvas.width * image.height) / image.width));
    const scale = canvas.width / image.width;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = scale < 2 * ratio;
    context.drawImage(pictures.photo, 0, 0, canvas.width, canvas.height);
    const base = root.querySelector("input[name=base]:checked").value;
    if (base !== "photograph" && loaded.prediction) {
      context.globalAlpha = base === "both" ? 0.55 : 1;
      context.imageSmoothingEnabled = false;
      context.drawImage(loaded.prediction, 0, 0, canvas.width, canvas.height);
      context.globalAlpha = 1;
    }
    context.fillStyle = "rgba(0, 0, 0, 0.28)";
    context.fillRect(0, 0, canvas.width, canvas.height);

    const notes = [];
    let ring = null;
    if (control("field").checked && shown.fields) {
      const number = nearestField(shown.fields);
      drawField(context, canvas, shown.fields, loaded.fields, number);
      ring = shown.fields.pixels[number];
      const same = ring.every((value, axis) => value === state.pixel[axis]);
      notes.push(`receptive field of ${same ? "this pixel" : `the nearest one that has one, row ${ring[0]}, column ${ring[1]}`}`);
      if (same) ring = null;
    }

    const depths = trace(shown.layers, state.pixel, [image.height, image.width]).slice(0, state.depth);
    const last = depths[depths.length - 1];
    const toCanvas = (value) => (value + 0.5) * scale;
    if (control("points").checked) {
      for (let depth = depths.length - 1; depth >= 0; depth--) {
        const radius = Math.max(1.3 * ratio, DEPTH_RADII[depth] * canvas.width);
        for (const [y, x] of depths[depth]) {
          context.beginPath();
          context.arc(toCanvas(x), toCanvas(y), radius, 0, 2 * Math.PI);
          context.fillStyle = DEPTH_COLOURS[depth];
          context.fill();
          context.lineWidth = 0.6 * ratio;
          context.strokeStyle = "rgba(0, 0, 0, 0.65)";
          context.stroke();
        }
      }
    }
    const circle = ([row, column], radius, colour, width, dash) => {
      context.beginPath();
      context.setLineDash(dash.map((length) => length * ratio));
      context.arc(toCanvas(column), toCanvas(row), radius * ratio, 0, 2 * Math.PI);
      context.lineWidth = width * ratio;
      context.strokeStyle = colour;
      context.stroke();
      context.setLineDash([]);
    };
    if (ring) circle(ring, 9, "#ffffff", 1.2, [3, 3]);
    circle(state.pixel, 7, "#000000", 4, []);
    circle(state.pixel, 7, "#35dcff", 2.2, []);

    const isOutside = ([y, x]) => y < -0.5 || x < -0.5 || y >= image.height - 0.5 || x >= image.width - 0.5;
    const outside = last.filter(isOutside).length;
    const mean = [0, 1].map((axis) => last.reduce((sum, point) => sum + point[axis], 0) / last.length);
    const spread = Math.sqrt(last.reduce((sum, [y, x]) => sum + (y - mean[0]) ** 2 + (x - mean[1]) ** 2, 0) / last.length);
    notes.unshift(`${last.length} points, ${outside} outside the image, spread ${spread.toFixed(1)} px`);
    if (loaded.classes) notes.unshift(`predicted: ${classAt(loaded.classes)}`);
    pane.querySelector(".pane-note").textContent = notes.join(" · ");
    pane.dataset.points = String(last.length);
    pane.samples = last; // for the console and the tests
  }

  function draw() {
    if (!pictures) return;
    const image = data.images[state.image];
    panes.forEach((pane, i) => drawPane(pane, canvases[i], state.shownNetworks[i]));
    const truth = pictures.truth ? `, truth: ${classAt(pictures.truth)}` : "";
    root.querySelector(".readout").textContent =
      `${image.name}, pixel row ${state.pixel[0]}, column ${state.pixel[1]}${truth}`;
  }

  function moveTo(row, column) {
    const image = data.images[state.image];
    const within = (value, size) => Math.min(size - 1, Math.max(0, value));
    state.pixel = [within(row, image.height), within(column, image.width)];
    draw();
  }

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  for (const canvas of canvases) {
    const choose = (event) => {
      const image = data.images[state.image];
      const box = canvas.getBoundingClientRect();
      const row = Math.floor(((event.clientY - box.top) * image.height) / box.height);
      moveTo(row, Math.floor(((event.clientX - box.left) * image.width) / box.width));
    };
    canvas.addEventListener("pointerdown", choose);
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons === 1) choose(event);
    });
    canvas.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      const image = data.images[state.image];
      const far = event.shiftKey ? 10 : 1;
      const size = Math.max(1, Math.round((far * Math.max(image.width, image.height)) / 200));
      moveTo(state.pixel[0] + size * step[0], state.pixel[1] + size * step[1]);
    });
  }
  for (const [number, button] of [...root.querySelectorAll(".thumbs button")].entries()) {
    button.addEventListener("click", () => show(number));
  }
  for (const input of root.querySelectorAll("[data-depth]")) {
    input.addEventListener("change", () => {
      state.depth = Number(input.dataset.depth);
      draw();
    });
  }
  for (const name of ["points", "field"]) control(name).addEventListener("change", draw);
  for (const input of root.querySelectorAll("input[name=base]")) input.addEventListener("change", draw);
  control("other")?.addEventListener("change", (event) => {
    state.shownNetworks = [state.shownNetworks[0], Number(event.target.value)];
    draw();
  });
  new ResizeObserver(draw).observe(root);
  await show(0);
  root.dataset.ready = "true";
}

const viewer = document.querySelector(".viewer");
if (viewer) startViewer(viewer);
