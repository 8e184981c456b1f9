import Foundation

/// Rows of the embedding, read from where `embedding.json` says they lie: int8, or int4 in pairs.
struct EmbeddingRows {
    let layout: EmbeddingFile
    private let files: [Data]  // of each piece

    init(artifact: URL) throws {
        let description = artifact.appending(path: "coreml/embedding.json")
        layout = try JSONDecoder().decode(EmbeddingFile.self, from: Data(contentsOf: description))
        for piece in layout.pieces {
            guard [4, 8].contains(piece.bits), piece.scalesType == "float16", piece.scalesOffset != nil
            else {
                throw DecoderError.unsupported("an embedding of \(piece.bits) bits")
            }
        }
        files = try layout.pieces.map {
            try Data(contentsOf: artifact.appending(path: $0.file), options: .alwaysMapped)
        }
    }

    /// `scale * scales[row, j / block] * values[row, j]`, in float32.
    func row(_ id: Int) -> [Float] {
        var index = 0
        var row = id
        while row >= layout.pieces[index].rows {
            row -= layout.pieces[index].rows
            index += 1
        }
        let piece = layout.pieces[index]
        let blocks = layout.width / piece.block
        let values = piece.valuesOffset + row * layout.width * piece.bits / 8
        let scales = piece.scalesOffset! + row * blocks * 2
        return files[index].withUnsafeBytes { bytes in
            (0..<layout.width).map { column in
                let bits = bytes.loadUnaligned(
                    fromByteOffset: scales + column / piece.block * 2, as: UInt16.self)
                let stored: Int
                if piece.bits == 8 {
                    stored = Int(bytes.loadUnaligned(fromByteOffset: values + column, as: Int8.self))
                } else {  // the first of two in the low half, two's complement
                    let pair = bytes[values + column / 2]
                    let half = Int(column % 2 == 0 ? pair & 15 : pair >> 4)
                    stored = half < 8 ? half : half - 16
                }
                return layout.scale * Float(Float16(bitPattern: bits)) * Float(stored)
            }
        }
    }
}
