// What may be done to an expert, in the words of every view that does it.

/** how -> [what to do, what then stands in the expert's slot, what was done] */
export const EXPERT_HOWS = {
  reroute: ["Switch off", "the next best steps in", "switched off"],
  silence: ["Silence", "its slot says nothing", "silenced"],
  force: ["Force", "it takes the slot of the least likely", "forced"],
};
