// A box that scrolls sideways can be reached by the keyboard, also one in a fold that is opened later.
{
  const boxes = [
    "div.claims",
    "div.settings",
    "div.cell_output > .output",
    "div.math",
    ".pst-scrollable-table-container",
    "pre",
  ].join();
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  addEventListener("load", reach);
  addEventListener("resize", reach);
  addEventListener("toggle", reach, true); // a fold; it does not bubble
}
