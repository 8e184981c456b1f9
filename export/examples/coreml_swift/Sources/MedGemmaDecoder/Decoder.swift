import CoreML
import Foundation

public enum DecoderError: Error {
    case unsupported(String)
    case tooLong(Int)
}

/// The decoder of an artifact with the GPU's layout: `prefill` and `decode` over one set of caches.
public final class Decoder {
    private let prefill: MLModel
    private let decode: MLModel
    private let caches: MLState
    private let sizes: DecoderSizes
    private let embedding: EmbeddingRows
    private var rows: [String: CacheRows] = [:]
    private var length = 0

    /// - Parameters:
    ///   - artifact: The directory that `medgemma-export --target coreml` wrote.
    ///   - compiled: `decoder.mlpackage` compiled, by Xcode or `MLModel.compileModel(at:)`.
    public init(artifact: URL, compiled: URL) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndGPU
        configuration.functionName = Names.prefill
        prefill = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        configuration.functionName = Names.decode
        decode = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        caches = prefill.makeState()  // both functions read and write it
        let facts = prefill.modelDescription.metadata[.creatorDefinedKey] as? [String: String]
        guard let text = facts?[Names.sizes] else {
            throw DecoderError.unsupported("a package without \(Names.sizes) in its metadata")
        }
        sizes = try JSONDecoder().decode(DecoderSizes.self, from: Data(text.utf8))
        embedding = try EmbeddingRows(artifact: artifact)
        for kind in sizes.kinds {
            rows[kind.name] = CacheRows(layers: kind.rows, window: kind.window)
        }
    }

    /// Append tokens; the logits after the last of them.
    ///
    /// - Parameters:
    ///   - ids: At most `chunk` tokens; cut a prompt so that no image is cut.
    ///   - images: For each token the number of its image, or -1 for text.
    ///   - features: What `vision.mlpackage` made of the images, a row for each of their tokens.
    public func read(_ ids: [Int], images: [Int], features: [[Float]] = []) async throws -> MLMultiArray {
        guard length + ids.count <= sizes.context, (1...sizes.chunk).contains(ids.count) else {
            throw DecoderError.tooLong(length + ids.count)
        }
        var next = features.makeIterator()
        let embedded = zip(ids, images).map { id, image in
            image < 0 ? embedding.row(id) : next.next() ?? embedding.row(id)
        }
        let given = try inputs(embedded, images: images)
        length += ids.count
        let result = try await (ids.count == 1 ? decode : prefill).prediction(from: given, using: caches)
        return result.featureValue(for: Names.logits)!.multiArrayValue!
    }

    /// All inputs of one call: embeddings and padding, rotary tables, masks, and the rows to write.
    private func inputs(_ embedded: [[Float]], images: [Int]) throws -> MLDictionaryFeatureProvider {
        let count = embedded.count
        let tokens = count == 1 ? 1 : sizes.chunk
        let positions = length..<(length + count)
        var features: [String: MLMultiArray] = [:]
        features[Names.embeddings] = try array([1, tokens, embedded[0].count]) { index in
            index[1] < count ? embedded[index[1]][index[2]] : 0
        }
        for kind in sizes.kinds {
            let start = rows[kind.name]!.take(positions, tokens: tokens)
            let taken = rows[kind.name]!
            let width = kind.rows.ropeWidth
            func angle(_ index: [Int]) -> Float {
                guard index[2] < count else { return 0 }
                let pair = Float(2 * index[3]) / Float(width)
                let frequency = 1 / powf(kind.rows.ropeTheta, pair) / kind.rows.ropeFactor
                return Float(positions.lowerBound + index[2]) * frequency
            }
            features[kind.name + Names.cosines] = try array([1, 1, tokens, width / 2]) { cosf(angle($0)) }
            features[kind.name + Names.sines] = try array([1, 1, tokens, width / 2]) { sinf(angle($0)) }
            features[kind.name + Names.mask] = try array([1, 1, tokens, kind.rows.rows]) { index in
                index[2] < count
                    && taken.isSeen(
                        row: index[3], by: index[2], positions: positions, images: images, start: start)
                    ? 0 : self.sizes.hidden
            }
            features[kind.name + Names.slot] = try integer(start)
        }
        if tokens > 1 { features[Names.last] = try integer(count - 1) }
        return try MLDictionaryFeatureProvider(dictionary: features)
    }

    /// A float16 array of which every element is a function of its index.
    private func array(_ shape: [Int], _ element: ([Int]) -> Float) throws -> MLMultiArray {
        var values = MLShapedArray<Float16>(repeating: 0, shape: shape)
        values.withUnsafeMutableShapedBufferPointer { buffer, _, _ in
            var index = Array(repeating: 0, count: shape.count)
            for place in buffer.indices {
                buffer[place] = Float16(element(index))
                for axis in shape.indices.reversed() {
                    index[axis] += 1
                    if index[axis] < shape[axis] { break }
                    index[axis] = 0
                }
            }
        }
        return MLMultiArray(values)
    }

    private func integer(_ value: Int) throws -> MLMultiArray {
        MLMultiArray(MLShapedArray<Int32>(scalars: [Int32(value)], shape: [1]))
    }
}
