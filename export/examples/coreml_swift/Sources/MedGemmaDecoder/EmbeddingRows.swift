import Foundation

/// Rows of the embedding, read from where `embedding.json` says they lie: int8, or int4 in pairs.
struct EmbeddingRows {
    let layout: EmbeddingFile
    private let data: Data

    init(artifact: URL) throws {
        let description = artifact.appending(path: "coreml/embedding.json")
        layout = try JSONDecoder().decode(EmbeddingFile.self, from: Data(contentsOf: description))
        guard [4, 8].contains(layout.bits), layout.scalesType == "float16", layout.scalesOffset != nil else {
            throw DecoderError.unsupported("an embedding of \(layout.bits) bits")
        }
        data = try Data(contentsOf: artifact.appending(path: layout.file), options: .alwaysMapped)
    }

    /// `scale * scales[row, j / block] * values[row, j]`, in float32.
    func row(_ id: Int) -> [Float] {
        let blocks = layout.width / layout.block
        let values = layout.valuesOffset + id * layout.width * layout.bits / 8
        let scales = layout.scalesOffset! + id * blocks * 2
        return data.withUnsafeBytes { bytes in
            (0..<layout.width).map { column in
                let bits = bytes.loadUnaligned(
                    fromByteOffset: scales + column / layout.block * 2, as: UInt16.self)
                let stored: Int
                if layout.bits == 8 {
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
