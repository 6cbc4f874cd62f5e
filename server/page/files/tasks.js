// What the page knows of the three tasks.

export const TASKS = {
  depth: {
    title: "How far is everything?",
    text: "Drop a picture here, paste one, or try one of these.",
    estimate: "depth",
    reductions: ["aligned_median", "median", "mean"],
    views: ["compare", "estimate", "uncertainty", "cloud"],
    samples: [{ name: "a cup of coffee", image: "cup.jpg" }, { name: "a cat", image: "frame-1.jpg" }],
  },
  flow: {
    title: "Where did everything move?",
    text: "Drop two pictures of one scene, a moment apart, or try these.",
    estimate: "motion",
    reductions: ["median", "mean"],
    views: ["compare", "estimate", "uncertainty"],
    samples: [{ name: "a cat comes nearer, a cup slides by", image: "frame-1.jpg", next: "frame-2.jpg" }],
  },
  amodal: {
    title: "What is the whole of it?",
    text: "Drop a picture with something half hidden, then mark what you see of it. Or try this one.",
    estimate: "the whole",
    reductions: ["median", "mean"],
    views: ["mark", "compare", "estimate", "object", "uncertainty"],
    samples: [{ name: "a cup behind a helmet, already marked", image: "hidden.jpg", mask: "hidden-mask.png" }, { name: "a cup behind a helmet, for you to mark", image: "hidden.jpg" }],
  },
};

export const PHASES = {
  queue: "Waiting for its turn …",
  encode: "Taking the picture in …",
  denoise: "Refining …",
  decode: "Drawing what was found …",
  ensemble: "Bringing the members together …",
};

const ALONG = { queue: 0.02, encode: 0.06, decode: 0.92, ensemble: 0.97 };

/** How much of the way is gone, 0 to 1. */
export const along = ({ done, total, phase }) => (phase === "denoise" ? 0.1 + (0.8 * done) / Math.max(1, total) : ALONG[phase] ?? 0);

const STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000];
const MEMBERS = [...Array(20).keys()].map((i) => i + 1).concat([25, 30, 40, 50, 75, 100, 200, 500, 1000]);
const DETAILS = [96, 128, 192, 256, 320, 384, 512, 640, 768, 1024];

/** What a dial may be turned to where the server allows `most`; the model's own value is always among it. */
export const stepsUpTo = (most, own) => upTo(STEPS, most, own);
export const membersUpTo = (most, own) => upTo(MEMBERS, most, own);
export const detailsUpTo = (most) => DETAILS.filter((px) => px <= most);

const upTo = (values, most, own) => [...new Set([...values.filter((value) => value < most), most, own])].filter((v) => v <= most).sort((a, b) => a - b);
