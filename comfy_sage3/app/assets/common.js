// What every component of the page needs. Each runs as a function of (element, props, watch); no part of it ever
// reads data as markup: texts become text nodes, numbers become attributes.
const make = (tag, properties = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return made;
};
const makeSvg = (tag, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
};
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
// Show what props.value holds, now and whenever it changes; the frame around it is built once and put back if lost.
const showing = (root, show) => {
  const again = () => {
    const place = element.querySelector(".s3-mount") ?? element;
    if (root.parentElement !== place) place.replaceChildren(root);
    show(props.value || null); // gradio says "" for None
  };
  watch("value", again);
  again();
};
