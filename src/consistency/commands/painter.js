// Runs in a gr.HTML. props.value: {image: address of a picture, free: a digit a pixel, row by row, 1 where painted}.
// With the keyboard, arrows move a frame over the picture and the space bar paints there.
const canvas = element.querySelector("canvas");
const paper = canvas.getContext("2d");
const brush = element.querySelector("input");
const hint = element.querySelector("p");
const picture = new Image();
let free = [];
let last = null;
let handed_over = null;
let framed = null;

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PAINT = "rgba(225, 29, 72, 0.75)";

function wipe() {
  free = new Array(canvas.width * canvas.height).fill(0);
  framed = null;
  redraw();
}

function redraw() {
  paper.clearRect(0, 0, canvas.width, canvas.height);
  paper.drawImage(picture, 0, 0);
  paper.fillStyle = PAINT;
  free.forEach((digit, index) => {
    if (digit) paper.fillRect(index % canvas.width, Math.floor(index / canvas.width), 1, 1);
  });
  if (!framed) return;
  paper.fillStyle = "rgba(37, 99, 235, 0.75)";
  paper.fillRect(framed[0], framed[1], 1, 1);
}

function show() {
  if (props.value.free === handed_over) return;
  handed_over = null;
  canvas.hidden = true;
  hint.hidden = Boolean(props.value.image);
  picture.src = props.value.image;
}

picture.onload = () => {
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  wipe();
  canvas.hidden = false;
};

function hand_over() {
  handed_over = free.join("");
  props.value = { image: props.value.image, free: handed_over };
}

function position(event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * canvas.width,
    ((event.clientY - box.top) / box.height) * canvas.height,
  ];
}

// Every pixel whose middle lies under the round brush on its way, and always the one under its own middle.
function paint(from, to) {
  const radius = (brush.value / 200) * canvas.width;
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
  paper.fillStyle = PAINT;
  for (let step = 0; step <= steps; step++) {
    const x = from[0] + ((to[0] - from[0]) * step) / steps;
    const y = from[1] + ((to[1] - from[1]) * step) / steps;
    for (let row = Math.floor(y - radius); row <= y + radius; row++) {
      for (let column = Math.floor(x - radius); column <= x + radius; column++) {
        const inside = row >= 0 && row < canvas.height && column >= 0 && column < canvas.width;
        const under = row === Math.floor(y) && column === Math.floor(x);
        const near = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius;
        if (!inside || !(near || under) || free[row * canvas.width + column]) continue;
        free[row * canvas.width + column] = 1;
        paper.fillRect(column, row, 1, 1);
      }
    }
  }
}

canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = position(event);
  paint(last, last);
};
canvas.onpointermove = (event) => {
  if (!last) return;
  const now = position(event);
  paint(last, now);
  last = now;
};
canvas.onpointerup = canvas.onpointercancel = () => {
  if (last) hand_over();
  last = null;
};
canvas.onkeydown = (event) => {
  const move = ARROWS[event.key];
  if (!move && event.key !== " ") return;
  event.preventDefault();
  framed = framed || [Math.floor(canvas.width / 2), Math.floor(canvas.height / 2)];
  if (move) {
    framed = [
      Math.min(canvas.width - 1, Math.max(0, framed[0] + move[0])),
      Math.min(canvas.height - 1, Math.max(0, framed[1] + move[1])),
    ];
  } else {
    const middle = [framed[0] + 0.5, framed[1] + 0.5];
    paint(middle, middle);
    hand_over();
  }
  redraw();
};
canvas.onblur = () => {
  framed = null;
  redraw();
};
element.querySelector("button").onclick = () => {
  wipe();
  hand_over();
};
watch("value", show);
show();
