// Draws every figure of the block of data in its place, and lets selections choose what it shows.
const figures = JSON.parse(document.getElementById("figures").textContent);

// What is told of a mark stands in a bubble beside it, as text: names of strangers are no markup.
const bubble = document.createElement("dl");
bubble.id = "bubble";
bubble.hidden = true;
document.body.append(bubble);

function tell(event, told) {
  bubble.replaceChildren();
  for (const [name, value] of Object.entries(told)) {
    const term = document.createElement("dt");
    const words = document.createElement("dd");
    term.textContent = name;
    words.textContent = value;
    bubble.append(term, words);
  }
  bubble.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = bubble;
  const left = Math.min(event.clientX + 12, document.documentElement.clientWidth - width - 4);
  const above = event.clientY - height - 12;
  bubble.style.left = `${Math.max(4, left)}px`;
  bubble.style.top = `${above > 4 ? above : event.clientY + 16}px`;
}

const hide = () => (bubble.hidden = true);
// A finger that was lifted leaves the bubble, and so do the mouse events that browsers make of it.
let touched = false;
for (const kind of ["pointerdown", "pointermove"]) {
  document.addEventListener(kind, (event) => (touched = event.pointerType === "touch"), true);
}
document.addEventListener("pointerdown", hide, true);
document.addEventListener("scroll", hide, true);

const options = {
  actions: false,
  ast: true, // expressions are interpreted: the page's policy forbids code that is made of text
  defaultStyle: false,
  mode: "vega-lite",
  renderer: "svg",
  tooltip: (handler, event, item, told) => {
    if (told) tell(event, told);
    else if (!touched) hide();
  },
};

async function draw([name, specification]) {
  const { view } = await vegaEmbed(document.getElementById(name), specification, options);
  view.addEventListener("pointerdown", (event, item) => item?.tooltip && tell(event, item.tooltip));
  const choice = document.querySelector(`select[data-figure="${name}"]`);
  if (!choice) return;
  const choose = () => view.signal("quantity", choice.value).runAsync();
  choice.addEventListener("change", choose);
  await choose();
}

Promise.all(Object.entries(figures).map(draw)).then(
  () => (document.documentElement.dataset.drawn = "yes"),
  (error) => console.error(error),
);
