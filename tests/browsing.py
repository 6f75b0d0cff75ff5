"""What tests with a real browser share."""

from __future__ import annotations

#: Sizes of a window.
DESKTOP, PHONE = (1440, 1000), (375, 812)
#: For Chromium without a user, a GPU or a reason to ask anybody.
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")

#: Colours other than the background on each chart's canvas: an empty chart has a handful, from its grid and words.
PAINT = """() => [...document.querySelectorAll('.uplot canvas')].map((canvas) => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b, a] = data.slice(i, i + 4);
    if (a > 200 && Math.max(r, g, b) - Math.min(r, g, b) > 60) painted += 1;
  }
  return painted;
})"""
