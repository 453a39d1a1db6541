"""A simulated catalog: a category tree with three levels, and items with titles and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pyarrow as pa

from peso.errors import DataError
from peso.events import columns
from peso.items.category_path import SEPARATOR

LATE_SHARE = 0.3  # the share of items released after stage 0; each leaf has an item from the start
ITEMS_A_LEAF = 7

# department → category → what is sold there
_TREE = {
    "Kitchen": {
        "Coffee": ("Coffee Grinder", "Moka Pot", "Pour-Over Set"),
        "Knives": ("Chef's Knife", "Bread Knife", "Knife Block"),
        "Baking": ("Loaf Tin", "Rolling Pin", "Mixing Bowl"),
        "Tea": ("Teapot", "Tea Infuser", "Kettle"),
        "Cookware": ("Frying Pan", "Stockpot", "Wok"),
        "Storage": ("Spice Rack", "Bread Bin", "Jar Set"),
    },
    "Garden": {
        "Seeds": ("Herb Seed Box", "Wildflower Mix", "Tomato Seed Set"),
        "Tools": ("Hand Trowel", "Pruning Shears", "Garden Fork"),
        "Watering": ("Watering Can", "Drip Kit", "Hose Reel"),
        "Pots": ("Planter", "Hanging Basket", "Seed Tray"),
        "Grilling": ("Charcoal Grill", "Grill Tongs", "Smoker Box"),
        "Lighting": ("Path Light", "Lantern", "String Lights"),
    },
    "Music": {
        "Guitars": ("Acoustic Guitar", "Capo", "Guitar Strap"),
        "Keys": ("Keyboard", "Sustain Pedal", "Keyboard Stand"),
        "Drums": ("Practice Pad", "Drumsticks", "Cajon"),
        "Recording": ("Condenser Microphone", "Audio Interface", "Pop Filter"),
        "Winds": ("Recorder", "Harmonica", "Reed Set"),
        "Scores": ("Songbook", "Etude Book", "Music Stand"),
    },
    "Outdoors": {
        "Camping": ("Tent", "Sleeping Bag", "Camp Stove"),
        "Hiking": ("Day Pack", "Trekking Poles", "Headlamp"),
        "Climbing": ("Harness", "Chalk Bag", "Carabiner Set"),
        "Cycling": ("Bike Light", "Pannier", "Floor Pump"),
        "Fishing": ("Fly Rod", "Tackle Box", "Landing Net"),
        "Paddling": ("Dry Bag", "Paddle", "Life Vest"),
    },
    "Games": {
        "Strategy": ("City Builder Game", "War Game", "Trading Game"),
        "Party": ("Word Game", "Drawing Game", "Bluffing Game"),
        "Puzzles": ("Jigsaw Puzzle", "Wooden Cube", "Logic Puzzle"),
        "Cards": ("Card Deck", "Trick-Taking Game", "Deck Builder"),
        "Dice": ("Dice Tower", "Dice Set", "Roll-and-Write Game"),
        "Miniatures": ("Paint Set", "Figure Kit", "Terrain Tile Set"),
    },
    "Crafts": {
        "Knitting": ("Yarn Bundle", "Knitting Needles", "Sock Kit"),
        "Painting": ("Watercolour Box", "Brush Set", "Canvas Pad"),
        "Paper": ("Origami Paper", "Bookbinding Kit", "Washi Tape Set"),
        "Leather": ("Leather Punch", "Wallet Kit", "Waxed Thread"),
        "Sewing": ("Fabric Bundle", "Pin Cushion", "Pattern Book"),
        "Pottery": ("Clay Block", "Glaze Set", "Carving Tools"),
    },
    "Office": {
        "Pens": ("Fountain Pen", "Gel Pen Set", "Ink Bottle"),
        "Notebooks": ("Dot Journal", "Sketchbook", "Pocket Planner"),
        "Desks": ("Desk Mat", "Monitor Stand", "Cable Box"),
        "Lamps": ("Desk Lamp", "Clip Light", "Reading Lamp"),
        "Filing": ("Document Box", "Ring Binder", "Label Maker"),
        "Chairs": ("Task Chair", "Footrest", "Seat Cushion"),
    },
    "Photo": {
        "Lenses": ("Prime Lens", "Macro Lens", "Lens Hood"),
        "Tripods": ("Tripod", "Ball Head", "Monopod"),
        "Bags": ("Camera Bag", "Camera Strap", "Padded Insert"),
        "Flashes": ("Speedlight", "Softbox", "Reflector"),
        "Film": ("Film Pack", "Developing Tank", "Negative Sleeves"),
        "Drones": ("Camera Drone", "Spare Rotor Set", "Landing Pad"),
    },
    "Pets": {
        "Dogs": ("Dog Lead", "Dog Bed", "Chew Toy"),
        "Cats": ("Scratching Post", "Cat Tunnel", "Litter Scoop"),
        "Birds": ("Bird Feeder", "Nest Box", "Perch Set"),
        "Fish": ("Aquarium Filter", "Air Stone", "Driftwood"),
        "Rodents": ("Running Wheel", "Hay Rack", "Hideout"),
        "Reptiles": ("Heat Mat", "Basking Lamp", "Terrarium Liner"),
    },
    "Fitness": {
        "Yoga": ("Yoga Mat", "Yoga Block", "Bolster"),
        "Weights": ("Kettlebell", "Dumbbell Pair", "Wrist Wraps"),
        "Running": ("Running Belt", "Reflective Vest", "Insoles"),
        "Swimming": ("Swim Goggles", "Kickboard", "Swim Cap"),
        "Boxing": ("Boxing Gloves", "Hand Wraps", "Skipping Rope"),
        "Recovery": ("Foam Roller", "Massage Ball", "Ice Pack"),
    },
    "Science": {
        "Astronomy": ("Telescope", "Star Chart", "Eyepiece"),
        "Microscopy": ("Microscope", "Slide Kit", "Stain Set"),
        "Electronics": ("Breadboard Kit", "Soldering Iron", "Sensor Pack"),
        "Chemistry": ("Crystal Kit", "Beaker Set", "Test Strips"),
        "Weather": ("Rain Gauge", "Barometer", "Wind Meter"),
        "Geology": ("Mineral Set", "Rock Hammer", "Field Loupe"),
    },
    "Travel": {
        "Luggage": ("Cabin Case", "Duffel Bag", "Packing Cubes"),
        "Sleep": ("Neck Pillow", "Sleep Mask", "Travel Blanket"),
        "Power": ("Power Bank", "Plug Adapter", "Charging Cable"),
        "Security": ("Luggage Lock", "Money Belt", "Document Pouch"),
        "Toiletries": ("Wash Bag", "Bottle Set", "Travel Towel"),
        "Maps": ("Road Atlas", "City Guide", "Phrase Book"),
    },
}
# third level: line → its description
_LINES = {
    "Compact": "folds small and weighs next to nothing",
    "Professional": "built for daily work and easy to service",
    "Vintage": "made to a pattern of the nineteen-fifties",
    "Eco": "made of recycled material and repairable at home",
    "Starter": "with a clear manual for the first weeks",
    "Deluxe": "hand-finished and delivered in a wooden box",
}
_BRANDS = ("Norvik", "Alder & Sons", "Tamura", "Brightwell", "Oskari", "Casa Luz", "Fenwick", "Halden")
_MATERIALS = ("beech", "stainless steel", "aluminium", "wool felt", "bamboo", "canvas", "recycled plastic")
_PROMISES = (
    "Comes with a two-year guarantee.",
    "Spare parts are kept in stock for ten years.",
    "Tested by our own staff for a season.",
    "A favourite of reviewers and of people with little room.",
)


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of their release, their leaf categories, and the category tree.

    Attributes:
        items: the item table.
        leaf: int64 (items,), the leaf of each item.
        release: int64 (items,), the stage in which each item is released, ascending.
        paths: the path of each leaf.
        departments: int64 (leaves,), the number of each leaf's department (the first level).
    """

    items: pa.Table
    leaf: np.ndarray
    release: np.ndarray
    paths: list[str]
    departments: np.ndarray


def make_catalogue(items: int, stages: int, rng: np.random.Generator) -> Catalogue:
    """Draw a catalog at random.

    The tree grows with the catalog, to about seven items per leaf and at most 12 × 6 × 6 leaves. Every leaf
    has an item from the start.

    Args:
        items: the number of items.
        stages: the number of stages over which they are released, including stage 0.

    Raises:
        DataError: there are fewer items than the smallest tree has leaves.
    """
    paths, departments = _tree(items)
    leaves = len(paths)
    if items < leaves:
        raise DataError(f"{items} items are too few for a category tree; simulate at least {leaves}")
    rest = rng.choice(leaves, items - leaves, p=rng.dirichlet(np.full(leaves, 4.0)))
    leaf = np.concatenate([np.arange(leaves), rest])
    late = rng.random(items) < LATE_SHARE
    late[:leaves] = False
    release = np.where(late & (stages > 1), rng.integers(1, max(stages, 2), items), 0)
    order = np.lexsort((rng.random(items), release))
    leaf, release = leaf[order], release[order]
    return Catalogue(_describe(leaf, paths, rng), leaf, release, paths, departments)


def _tree(items: int) -> tuple[list[str], np.ndarray]:
    """The path and the department of each leaf."""
    wanted = max(items / ITEMS_A_LEAF, 8)
    side = round(wanted ** (1 / 3))
    lines = min(max(side, 2), len(_LINES))
    categories = min(max(side, 2), 6)
    departments = min(max(round(wanted / (lines * categories)), 2), len(_TREE))
    tree = [
        (number, SEPARATOR.join((department, category, line)))
        for number, (department, sold) in enumerate(list(_TREE.items())[:departments])
        for category, line in product(list(sold)[:categories], list(_LINES)[:lines])
    ]
    return [path for _, path in tree], np.array([number for number, _ in tree])


def _describe(leaf: np.ndarray, paths: list[str], rng: np.random.Generator) -> pa.Table:
    """The item table. Titles include a number that counts the items of a leaf, so they are all different."""
    made = np.zeros(len(paths), dtype=np.int64)
    brands, materials, promises, nouns = (
        rng.integers(0, len(words), len(leaf)) for words in (_BRANDS, _MATERIALS, _PROMISES, "abc")
    )
    titles, texts = [], []
    for row, number in enumerate(leaf):
        department, category, line = paths[number].split(SEPARATOR)
        made[number] += 1
        noun, brand = _TREE[department][category][nouns[row]], _BRANDS[brands[row]]
        titles.append(f"{brand} {line} {noun} No. {made[number]}")
        texts.append(
            f"{noun} by {brand}, {_LINES[line]}. Details in {_MATERIALS[materials[row]]}; "
            f"number {made[number]} of our {line.lower()} {category.lower()} series for the "
            f"{department.lower()} shelf. {_PROMISES[promises[row]]}"
        )
    return pa.Table.from_arrays(
        [
            pa.array([f"i{row}" for row in range(len(leaf))]),
            pa.array(titles),
            pa.array(texts),
            pa.array([paths[number] for number in leaf]),
        ],
        schema=columns.ITEMS,
    )
