/// Which position each row of one kind of cache holds, as `static_cache.py` keeps it.
struct CacheRows {
    let layers: LayerRows
    let window: Int?
    private var held: [Int]
    private var next = 0

    init(layers: LayerRows, window: Int?) {
        self.layers = layers
        self.window = window
        held = Array(repeating: -1, count: layers.rows)
    }

    /// Rows for so many tokens, padding included; the first row. A chunk never wraps.
    mutating func take(_ positions: Range<Int>, tokens: Int) -> Int {
        if next + tokens > held.count { next = 0 }
        let start = next
        for index in 0..<tokens {
            held[start + index] = index < positions.count ? positions.lowerBound + index : -1
        }
        next = start + positions.count
        return start
    }

    /// Whether the new token `index` sees a row: causal, within the window, and all of its own image.
    func isSeen(row: Int, by index: Int, positions: Range<Int>, images: [Int], start: Int) -> Bool {
        guard held[row] >= 0 else { return false }
        let distance = positions.lowerBound + index - held[row]
        let other = row - start
        let isSameImage = images.indices.contains(other) && images[index] >= 0 && images[index] == images[other]
        guard distance >= 0 || isSameImage else { return false }
        return window.map { distance < $0 } ?? true
    }
}
