// swift-tools-version:6.0
import PackageDescription

let package = Package(
    name: "MedGemmaDecoder",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "MedGemmaDecoder", targets: ["MedGemmaDecoder"])],
    targets: [.target(name: "MedGemmaDecoder")]
)
