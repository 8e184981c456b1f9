// Every name that the package, its metadata and `embedding.json` have. A test holds this file against a package.

enum Names {
    static let prefill = "prefill"
    static let decode = "decode"
    static let embeddings = "inputs_embeds"
    static let last = "last"
    static let logits = "logits"
    static let cosines = "_cos"  // behind `local` or `global`, as the three below
    static let sines = "_sin"
    static let mask = "_mask"
    static let slot = "_slot"
    static let sizes = "decoder"  // key of the creator-defined metadata
}

/// What the package says under `Names.sizes`.
struct DecoderSizes: Decodable {
    let chunk: Int
    let context: Int
    let window: Int?
    let hidden: Float
    let local: LayerRows?
    let global: LayerRows?

    /// The layers with a window, and those without.
    var kinds: [(name: String, rows: LayerRows, window: Int?)] {
        var found: [(String, LayerRows, Int?)] = []
        if let local { found.append(("local", local, window)) }
        if let global { found.append(("global", global, nil)) }
        return found
    }
}

/// Layers of one kind: rows of their cache, and their rotary embedding.
struct LayerRows: Decodable {
    let rows: Int
    let ropeTheta: Float
    let ropeFactor: Float
    let ropeWidth: Int

    enum CodingKeys: String, CodingKey {
        case rows = "rows"
        case ropeTheta = "rope_theta"
        case ropeFactor = "rope_factor"
        case ropeWidth = "rope_width"
    }
}

/// `embedding.json`: where the rows of the embedding lie, in the order of their ids.
struct EmbeddingFile: Decodable {
    let width: Int
    let scale: Float
    let imageID: Int?
    let pieces: [EmbeddingPiece]

    enum CodingKeys: String, CodingKey {
        case width = "width"
        case scale = "scale"
        case imageID = "image_id"
        case pieces = "pieces"
    }
}

/// Consecutive rows that are stored alike.
struct EmbeddingPiece: Decodable {
    let rows: Int
    let bits: Int
    let block: Int
    let file: String
    let valuesOffset: Int
    let scalesOffset: Int?
    let scalesType: String?

    enum CodingKeys: String, CodingKey {
        case rows = "rows"
        case bits = "bits"
        case block = "block"
        case file = "file"
        case valuesOffset = "values_offset"
        case scalesOffset = "scales_offset"
        case scalesType = "scales_dtype"
    }
}
