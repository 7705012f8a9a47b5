// The pairs of pictures of one comparison, fetched when they are needed and a little before; so many are kept and no more.
import { api } from "/scripts/api.js";

const KEPT = 64, AHEAD = 4;

export class Frames {
    // ``onReady`` is called when a picture that was asked for has come.
    constructor(data, onReady) {
        this.files = data.files;
        this.count = data.shown.length;
        this.onReady = onReady;
        this.lost = false; // a picture is not on the server any more
        this.pairs = new Map(); // place -> {a, b, ready}
    }

    url(name) {
        const query = new URLSearchParams({ filename: name, subfolder: this.files.subfolder, type: this.files.type });
        return api.apiURL(`/view?${query}`);
    }

    load(at) {
        if (this.pairs.has(at)) return this.pairs.get(at);
        const pair = { ready: false };
        for (const side of ["a", "b"]) {
            pair[side] = new Image();
            pair[side].src = this.url(this.files[side][at]);
        }
        this.pairs.set(at, pair);
        Promise.all([pair.a.decode(), pair.b.decode()]).then(
            () => {
                pair.ready = true;
                this.onReady();
            },
            () => {
                this.lost = true;
                this.onReady();
            },
        );
        while (this.pairs.size > KEPT) this.pairs.delete(this.pairs.keys().next().value);
        return pair;
    }

    // Whether the pair at a place has come; asks for it.
    ready(at) {
        return this.load(at).ready;
    }

    // The pair at a place, or null until it has come.
    get(at) {
        const pair = this.load(at);
        for (let i = 1; i <= Math.min(AHEAD, this.count - 1); i++) this.load((at + i) % this.count);
        return pair.ready ? pair : null;
    }
}
