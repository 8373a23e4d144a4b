"""Draw the hand-made label maps which the demonstration shows beside its photographs.

The two photographs are in the public domain and travel with Python packages:

* ``astronaut.png``, scikit-image's portrait of Eileen Collins (NASA), 512x512;
* ``grace_hopper.jpg``, matplotlib's portrait of Grace Hopper (US Navy), cropped to its top
  512x512 pixels.

The outlines below were placed by hand over enlarged views of the photographs, so the label maps
are the project's own work and need neither a data set nor a segmentation network. Only Pillow is
needed, and the same outlines always give the same pixels. ``python make_label_maps.py`` writes
``labels/astronaut.png`` and ``labels/grace_hopper.png`` next to this file.
"""

from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 512

BACKGROUND = 0
FACE = 1
BODY = 2

# The pixels hold the labels; these colours only make the files readable in an image viewer.
PALETTE = {
    BACKGROUND: (38, 70, 83),
    FACE: (244, 196, 120),
    BODY: (214, 90, 66),
}

# Each outline is a closed polygon, written as the points of an SVG polygon: "x,y x,y ...", in
# pixels of the photograph, clockwise as seen. The points lie close enough together that straight
# lines between them stay well within a pixel of the curve they follow.

# The whole silhouette: hair, ears, pressure suit with its neck ring, and the helmet in her arm.
# The face is drawn over it, and what the face leaves is the body.
ASTRONAUT_BODY = """
    230,16 238,16 246,19 253,22 260,24 268,28 276,31 283,37 288,42 292,49 295,56 297,63 298,70
    300,77 301,85 301,90 299,96 297,103 295,108 291,113 286,119 282,124 278,128 277,132 274,135
    270,136 267,136 266,141 264,146 262,153 258,160 257,161 256,166 255,173 262,177 270,183 278,190
    285,198 291,206 296,214 300,223 303,232 310,238 317,242 322,245 325,248 330,252 335,256 340,262
    344,269 346,275 347,283 350,283 352,287 354,297 355,305 356,314 358,322 360,328 362,332 360,334
    360,340 361,346 364,347 367,349 372,347 380,345 388,344 395,343 402,343 410,344 418,345 426,347
    436,350 446,355 455,361 464,368 472,376 479,385 485,395 489,405 492,415 494,427 496,438 497,449
    499,450 500,454 503,455 503,459 501,461 502,463 505,466 507,471 507,480 509,485 511,485 511,511
    41,511 37,505 33,499 30,492 28,484 25,475 24,465 23,455 23,445 24,437 23,430 21,420 20,410
    19,397 20,390 22,385 24,380 25,371 26,360 26,352 25,345 28,339 30,333 31,327 33,318 36,310
    39,304 40,300 40,296 41,291 45,283 49,275 54,266 58,258 63,250 67,246 73,241 78,236 85,231
    92,225 98,220 102,216 107,209 112,206 113,200 116,197 114,194 112,189 113,186 118,186 121,181
    124,176 128,170 131,164 136,158 143,154 151,151 160,149 170,148 178,148 184,149 183,143 182,137
    181,132 177,131 174,128 172,123 171,118 167,114 163,110 159,105 156,100 155,93 154,85 154,77
    153,70 154,63 157,57 161,52 166,48 173,43 180,40 188,36 191,33 193,30 199,26 204,23 210,21
    217,19 224,17
"""

# The skin between fringe, temples and jaw, and the lobes of both ears below the hair.
ASTRONAUT_FACE = """
    187,72 190,73 194,76 198,79 202,82 208,82 213,80 220,80 230,80 238,81 245,83 252,85 258,88
    263,89 268,89 268,97 270,107 271,115 270,123 270,129 273,130 278,128 277,132 274,135 270,136
    267,136 266,141 264,146 262,153 258,160 255,163 250,167 243,172 235,176 227,178 218,178 210,176
    202,172 196,167 190,161 186,154 184,149 183,143 182,137 181,132 177,131 174,128 172,123 171,118
    175,117 179,120 181,117 181,110 181,101 183,92 185,82
"""

# The whole silhouette: cap, hair, ears, neck and uniform.
GRACE_HOPPER_BODY = """
    249,22 262,22 271,24 281,27 289,31 295,36 300,40 308,41 316,44 326,49 336,56 344,63 350,72
    353,80 354,86 357,87 362,86 365,89 368,95 369,105 370,119 371,133 371,143 371,155 370,167
    368,178 367,182 371,184 374,189 376,196 375,204 373,214 370,224 368,235 366,247 363,258 362,265
    361,273 358,283 354,292 349,301 343,305 336,306 332,303 331,308 330,312 335,319 341,323 348,329
    355,335 363,340 373,343 384,348 396,354 408,359 420,365 432,368 444,371 454,373 464,377 474,382
    483,388 488,389 492,392 495,398 498,406 501,418 505,430 509,441 511,447 511,511 21,511 22,505
    23,494 25,482 26,470 28,455 29,445 29,438 31,432 33,426 35,420 37,414 39,406 42,397 46,389
    51,383 57,380 62,380 69,375 78,371 88,367 98,364 112,363 124,359 136,353 148,350 160,346 170,342
    180,336 187,330 193,323 200,317 203,312 202,306 200,299 193,297 185,293 177,288 169,284 164,278
    161,268 159,258 160,249 162,237 163,233 160,224 156,218 154,210 153,201 155,193 157,189 155,186
    152,182 150,176 149,165 149,150 149,135 149,122 151,114 153,108 157,102 161,96 168,89 174,86
    174,83 176,77 179,68 185,59 194,51 204,45 214,41 220,40 225,34 231,28 240,24
"""

# The skin below the brim: the hair at the temples and before the ears is left out, the ears and
# the spectacles belong to the face.
GRACE_HOPPER_FACE = """
    184,146 190,142 198,137 206,134 216,132 224,131 232,131 240,132 252,133 264,133 276,132 288,130
    300,130 312,131 322,133 330,137 340,143 348,149 349,160 352,168 354,174 357,181 354,187 351,192
    350,200 352,206 355,203 358,197 360,190 362,184 367,182 371,184 374,189 376,196 375,204 373,214
    370,224 368,235 366,247 363,258 359,264 350,270 345,269 341,267 339,273 338,279 336,285 333,293
    331,300 329,303 324,311 318,318 310,325 303,327 290,328 274,330 257,330 244,329 230,328 221,326
    214,321 210,314 206,306 202,299 199,289 195,279 193,270 190,260 187,266 183,270 177,268 170,262
    167,252 166,243 163,233 160,224 156,218 154,210 153,201 155,193 157,189 160,191 161,195 164,201
    166,206 170,208 174,209 178,208 181,204 181,199 179,193 178,184 180,174 182,163 182,155
"""

# For each label map the outlines in drawing order: the face is drawn over the body.
LABEL_MAPS = {
    "astronaut": ((BODY, ASTRONAUT_BODY), (FACE, ASTRONAUT_FACE)),
    "grace_hopper": ((BODY, GRACE_HOPPER_BODY), (FACE, GRACE_HOPPER_FACE)),
}


def parse_outline(outline: str) -> list[tuple[int, int]]:
    """Return the points of an outline written as ``"x,y x,y ..."``."""
    points = []
    for pair in outline.split():
        x, y = pair.split(",")
        points.append((int(x), int(y)))
    return points


def draw_label_map(outlines: tuple[tuple[int, str], ...]) -> Image.Image:
    """Return a palette image whose pixel values are labels, later outlines over earlier ones.

    A palette image is used because every reader gets the labels back exactly, while a viewer
    still shows them in colours that can be told apart.
    """
    label_map = Image.new("P", (SIZE, SIZE), BACKGROUND)
    colours = [channel for label in sorted(PALETTE) for channel in PALETTE[label]]
    # A palette of fewer than 17 colours would be written with less than 8 bits a pixel.
    label_map.putpalette(colours + [0] * (3 * 256 - len(colours)))
    draw = ImageDraw.Draw(label_map)
    for label, outline in outlines:
        draw.polygon(parse_outline(outline), fill=label)
    return label_map


def main() -> None:
    """Write every label map into the ``labels`` folder next to this file."""
    folder = Path(__file__).resolve().parent / "labels"
    folder.mkdir(exist_ok=True)
    for name, outlines in LABEL_MAPS.items():
        draw_label_map(outlines).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
